"""The command line."""

from deployments.cli.main import main

__all__ = ["main"]
