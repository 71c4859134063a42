"""A running server, and the environments of the servers that the tests of this folder start."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deployments.cli.local_server import TRACING_VARIABLE

TOKEN = "ab" * 32
MOST_WORKERS = 2  # under load


@dataclass(frozen=True)
class Started:
    """A running server, and the folder that is its home and holds its pool."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path


def untraced() -> dict[str, str]:
    """Return this process's environment without traces: traced requests would pass Serve's proxy."""
    return {name: value for name, value in os.environ.items() if name != TRACING_VARIABLE}


def in_home(folder: Path, mode: str) -> dict[str, str]:
    """Return an environment with this home folder, in which Ray keeps its files, and this mode of authentication."""
    return untraced() | {"HOME": str(folder), "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": mode}
