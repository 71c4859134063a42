"""The adapter bank, and the adapters resident in it."""
