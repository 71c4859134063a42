"""The engine: scheduling, steps and rows."""
