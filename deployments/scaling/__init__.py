"""Autoscaling and request routing policies of Ray Serve."""
