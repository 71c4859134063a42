"""Requests, prompts and their validation."""
