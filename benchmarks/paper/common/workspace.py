"""The files of a study that are not committed, below one cache folder: source, splits, adapters, stores, raw rows."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results_file import RESULTS
from lora_store.location import DEFAULT_CACHE_DIR

logger = logging.getLogger(__name__)
SOURCE = "bigbench==1.0.0"
DEFAULT_ROOT = DEFAULT_CACHE_DIR / "paper"
PAPER_RESULTS = RESULTS / "paper"
_ARCHIVE = "bigbench-1.0.0.tar.gz"


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders of one study. Each is created when something is written."""

    root: Path = DEFAULT_ROOT

    @property
    def archive(self) -> Path:
        return self.root / "source" / _ARCHIVE

    @property
    def splits(self) -> Path:
        return self.root / "splits"

    @property
    def adapters(self) -> Path:
        """Return the folder of adapters, one PEFT folder per task."""
        return self.root / "adapters"

    @property
    def rows(self) -> Path:
        """Return the folder of raw answers, one file per run."""
        return self.root / "rows"

    @property
    def encoders(self) -> Path:
        return self.root / "encoders"

    def store_uri(self, name: str) -> str:
        return str(self.root / "stores" / name)


def fetch_archive(workspace: Workspace) -> Path:
    """Return the source distribution of all tasks (358 MB). Download it with pip once.

    Raises: subprocess.CalledProcessError if pip cannot download it; its output has the reason.
    """
    path = workspace.archive
    if not path.exists():
        logger.info("pip downloads %s (358 MB) into %s", SOURCE, path.parent)
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(path.parent)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, SOURCE], check=True)
    return path
