"""Structured output: compile grammars, and compute the ids that each may continue with."""
