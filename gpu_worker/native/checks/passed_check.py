"""Note that a model agreed with transformers, so that later starts with the same files need not compare it again.

The note has what the comparisons of single modules chose too: see `Choices`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import gpu_worker
import lora_store
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.model.base_model import model_source
from gpu_worker.model.packed_linear import may_use_tiles
from gpu_worker.native.kernels.kernel_build import KernelUnavailable
from gpu_worker.native.kernels.kernel_loading import check_trusted, num_missing_kernels
from gpu_worker.native.kernels.kernel_variants import this_processor

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_CODE = (".py", ".cpp", ".h", ".so")
_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "CXX", "CXXFLAGS", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
)
_MOST_NOTES = 64  # the oldest go
_IMPORTED_AT = time.time()  # of this code


class PassedCheck:
    """The note about the model of a worker, in `cache_dir`.

    It is found again only with the same files of the model and of this package, by size and time of change, the same
    settings of the worker, versions of packages, compiled kernels, and processor or GPU. Create it before the model is
    loaded: what changes meanwhile is not noted. `source`: what `model_source` returned.
    """

    def __init__(self, config: NativeWorkerConfig) -> None:
        self._config, self.source = config, model_source(config)
        self._folder = config.cache_dir / "passed_checks"
        self._name = self._describe()

    def read(self) -> list[int | None] | None:
        """Return the noted choices, or None if there is no whole note that only this user and root can write."""
        try:
            check_trusted(self._folder / self._name, os.geteuid())
            found = json.loads((self._folder / self._name).read_text()) if self._name else None
        except (KernelUnavailable, OSError, ValueError):
            return None
        return found if isinstance(found, list) else None

    def note(self, choices: Sequence[int | None]) -> None:
        """Write the note, if nothing changed since the start. Without it the next start compares again.

        `choices`: of `fuse` and `compile_layers`, so that later starts need not compare the modules either.
        """
        if not self._name or self._describe() != self._name:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = self._folder / f".{self._name}.{os.getpid()}"
            written.touch(mode=0o600)
            written.write_text(json.dumps(list(choices)))
            written.replace(self._folder / self._name)
            notes = [path for path in self._folder.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
            for old in sorted(notes, key=lambda path: path.stat().st_mtime)[:-_MOST_NOTES]:
                old.unlink(missing_ok=True)
        except OSError:
            return

    def _describe(self) -> str:
        """Return a digest of what the result depends on, or "" if that is unknown: the model has an id and no folder,
        a file cannot be read, code is newer than what this process runs, or there is no such device.
        """
        config = self._config
        is_missing = config.device != "cpu" and not torch.cuda.is_available()
        try:
            if is_missing or not Path(self.source).is_dir():
                return ""
            code = [path for package in (gpu_worker, lora_store) for path in _sources(Path(package.__path__[0]))]
            if max(path.stat().st_mtime for path in code) > _IMPORTED_AT:
                return ""
            missing = num_missing_kernels(config)  # it compiles the others
            facts = {
                "files": [*_states(sorted(Path(self.source).iterdir())), *_states(code)],
                "kernels": [missing, *_states(sorted((config.cache_dir / "native").glob("*.so")))],
                "settings": repr(config),
                "packages": [f"{name} {version(name)}" for name in _PACKAGES] + [platform.python_version()],
                "processor": this_processor().description,
                "device": torch.cuda.get_device_name(config.device) if config.device != "cpu" else may_use_tiles(),
                "variables": {name: os.environ.get(name) for name in _VARIABLES},
            }
        except OSError:
            return ""
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _sources(package: Path) -> Iterable[Path]:
    return sorted(path for path in package.rglob("*") if path.suffix in _CODE)


def _states(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        found = path.stat()
        yield f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
