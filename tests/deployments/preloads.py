"""Folders of adapters for the preload of a server."""

from __future__ import annotations

from pathlib import Path


def preload_of(folder: Path, *names: str) -> tuple[Path, ...]:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").touch()
    return (folder,)
