"""Where adapters lie, and which files are one. Apart from the rest: the command line imports it at its start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

CONFIG_FILE = "adapter_config.json"
# All that admission looks at, the pickle to refuse it. What else a training run leaves is never copied or uploaded.
ADAPTER_FILES = (
    CONFIG_FILE,
    "adapter_model.safetensors",
    "lora_samples.jsonl",
    "description.txt",
    "adapter_model.bin",
)


def adapter_folders(path: Path) -> list[Path]:
    """`path` itself when it is an adapter, else the adapters in it, sorted."""
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
    """The files of the adapter in `folder` that are there."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files of the adapter in `folder` that are there. Links count as themselves."""
    return sum((folder / name).lstat().st_size for name in ADAPTER_FILES if (folder / name).is_file())
