"""Folders of adapters for a server to begin with."""

from __future__ import annotations

from pathlib import Path


def preload_of(folder: Path, *names: str) -> tuple[Path, ...]:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").touch()
    return (folder,)
