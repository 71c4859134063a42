"""Find adapter folders and their files. This module is separate because the command line imports it at its start."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

logger = logging.getLogger(__name__)
CONFIG_FILE = "adapter_config.json"
# The files that validation reads; the pickle is refused. Other files of a training run are never copied or uploaded.
ADAPTER_FILES = (
    CONFIG_FILE,
    "adapter_model.safetensors",
    "adapters.safetensors",  # MLX's name
    "lora_samples.jsonl",
    "description.txt",
    "chat_template.jinja",
    "adapter_io.yaml",
    "io.yaml",
    "adapter_model.bin",
)
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # the name that transformers' Trainer gives


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter's folder, and its name: near the folder's, or for a checkpoint that of the training run around it."""

    path: Path
    name: str

    @classmethod
    def of(cls, path: Path) -> AdapterFolder:
        whole = path.resolve()
        return cls(path, whole.parent.name if _CHECKPOINT.fullmatch(whole.name) else whole.name)

    @property
    def new_name(self) -> str | None:
        """Its name if it differs from the folder's."""
        return None if self.name == self.path.resolve().name else self.name


def adapter_folders(path: Path) -> list[AdapterFolder]:
    """Return `path` itself if it is an adapter or a training run's output, otherwise those in it, sorted.

    Of a training run this is the last checkpoint, unless the output folder holds the final adapter itself. Names are
    the nearest valid ones, but where two folders would get the same. A folder in `path` that this process may not enter
    is left out. Raises: OSError if it may not enter `path`.
    """
    own = _adapter_at(path)
    found = [own] if own else [adapter for place in sorted(path.glob("*")) if (adapter := _adapter_in(place))]
    nearest = [nearest_name(adapter.name) for adapter in found]
    times = Counter(nearest)
    return [
        replace(adapter, name=name) if times[name] == 1 else adapter
        for adapter, name in zip(found, nearest, strict=True)
    ]


def nearest_name(text: str) -> str:
    """Return the valid name that is nearest to `text`, or `text` itself if none of its letters may be in a name."""
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        return text
    letters = unicodedata.normalize("NFKD", text[:200]).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._]+", "-", letters).strip("-")[:64] or text


def _adapter_in(path: Path) -> AdapterFolder | None:
    try:
        return _adapter_at(path)
    except PermissionError as exc:
        logger.warning("%s is left out: %s", path, exc.strerror)
        return None


def _adapter_at(path: Path) -> AdapterFolder | None:
    if (path / CONFIG_FILE).exists():
        return AdapterFolder.of(path)
    checkpoints = {
        int(step[1]): config.parent
        for config in path.glob(f"checkpoint-*/{CONFIG_FILE}")
        if (step := _CHECKPOINT.fullmatch(config.parent.name))
    }
    return AdapterFolder.of(checkpoints[max(checkpoints)]) if checkpoints else None


def linked_files(folder: Path) -> list[Path]:
    """Return the adapter's files in `folder` that are symbolic links, which may lead to any file of this machine."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_symlink()]


def adapter_files(folder: Path) -> list[Path]:
    """Return the existing files of the adapter in `folder`."""
    return [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]


def folder_bytes(folder: Path) -> int:
    """Return the size of the existing files of the adapter in `folder`. Links count with their own size.

    Files that this process may not reach count nothing.
    """
    files = [folder / name for name in ADAPTER_FILES]
    return sum(os.lstat(file).st_size for file in files if os.path.isfile(file))  # unlike Path.is_file it never raises
