"""Devices: memory, threads and transfers."""
