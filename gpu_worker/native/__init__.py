"""The native engine: one thread that computes a packed step for all rows at once."""
