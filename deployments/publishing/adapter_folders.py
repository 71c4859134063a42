"""Find adapter folders and their files. This module is separate because the command line imports it at its start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

CONFIG_FILE = "adapter_config.json"
# The files that validation reads; the pickle is refused. Other files of a training run are never copied or uploaded.
ADAPTER_FILES = (
    CONFIG_FILE,
    "adapter_model.safetensors",
    "lora_samples.jsonl",
    "description.txt",
    "adapter_model.bin",
)


def adapter_folders(path: Path) -> list[Path]:
    """Return `path` itself if it is an adapter, otherwise the adapters in it, sorted."""
    if (path / CONFIG_FILE).exists():
        return [path]
    return sorted(config.parent for config in path.glob(f"*/{CONFIG_FILE}"))


def linked_files(folder: Path) -> list[Path]:
    """Return the adapter's files in `folder` that are symbolic links, which may lead to any file of this machine."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_symlink()]


def open_plain(path: Path) -> BinaryIO:
    """Open a file without following a symbolic link in its place. Raises: OSError."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


def adapter_files(folder: Path) -> list[Path]:
    """Return the existing files of the adapter in `folder`."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]


def folder_bytes(folder: Path) -> int:
    """Return the size of the existing files of the adapter in `folder`. Links count with their own size."""
    return sum((folder / name).lstat().st_size for name in ADAPTER_FILES if (folder / name).is_file())
