"""Packed attention over the KV cache."""
