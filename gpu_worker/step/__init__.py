"""Shared state of the layers in one step."""
