"""The adapter bank and what is resident in it."""
