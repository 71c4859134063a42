"""Note that a model agreed with transformers, so that later starts with the same files need not compare it again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

import gpu_worker
import lora_store
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.native.kernels.kernel_loading import num_missing_kernels
from gpu_worker.native.kernels.kernel_variants import this_processor

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
_CODE = (".py", ".cpp", ".h", ".so")
_VARIABLES = ("ATEN_CPU_CAPABILITY", "CXX", "CXXFLAGS", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")
_MOST_NOTES = 64  # the oldest go


class PassedCheck:
    """The note about one model in `cache_dir`.

    It is found again only with the same files of the model and of this package, by size and time of change, the same
    settings of the worker, versions of packages, compiled kernels, and processor or GPU.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self._folder, self._digest = folder, digest

    @classmethod
    def of(cls, config: NativeWorkerConfig, source: str) -> PassedCheck | None:
        """Return the note about a model. `source`: its folder; None for a model that has an id instead."""
        if not Path(source).is_dir():
            return None
        facts = {
            "model": list(_describe(path for path in sorted(Path(source).iterdir()) if path.is_file())),
            "code": [
                line for package in (gpu_worker, lora_store) for line in _describe(_sources(Path(package.__path__[0])))
            ],
            "settings": repr(config),
            "packages": [f"{name} {version(name)}" for name in _PACKAGES] + [platform.python_version()],
            "processor": this_processor().description,
            "device": torch.cuda.get_device_name(config.device) if config.device != "cpu" else "cpu",
            "missing kernels": num_missing_kernels(config),
            "variables": {name: os.environ.get(name) for name in _VARIABLES},
        }
        return cls(config.cache_dir / "passed_checks", hashlib.sha256(json.dumps(facts).encode()).hexdigest())

    @property
    def is_noted(self) -> bool:
        return (self._folder / self._digest).exists()

    def note(self) -> None:
        """Write the note. A folder that cannot be written costs the next start a comparison."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / self._digest).touch()
            notes = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in notes[:-_MOST_NOTES]:
                old.unlink(missing_ok=True)
        except OSError:
            return


def _sources(package: Path) -> Iterable[Path]:
    return sorted(path for path in package.rglob("*") if path.suffix in _CODE)


def _describe(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        found = path.stat()
        yield f"{path} {found.st_size} {found.st_mtime_ns}"
