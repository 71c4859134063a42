"""Calls between deployments: transport, retries, heartbeats and deadlines."""
