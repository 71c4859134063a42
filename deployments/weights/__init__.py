"""Adapter weights on their way from the Store to a Worker."""
