"""Programs that stand in for a C++ compiler."""

from __future__ import annotations

from pathlib import Path


def script(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
