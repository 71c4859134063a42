"""Offline answering of files with Ray Data."""
