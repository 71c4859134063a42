"""Metrics, logs, traces and usage."""
