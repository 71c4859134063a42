"""Publish, withdraw and maintain adapters."""
