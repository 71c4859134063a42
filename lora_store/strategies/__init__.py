"""Strategies: the ways to compose adapters, one object in one file each. `registry` lists them."""
