"""API keys, callers, quotas and the tokens of the Ray cluster."""
