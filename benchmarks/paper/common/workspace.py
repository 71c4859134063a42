"""Where the study keeps what is not committed: source, splits, adapters, stores, raw rows, below one cache folder."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results_file import RESULTS
from gpu_worker.config import DEFAULT_CACHE_DIR

logger = logging.getLogger(__name__)
SOURCE = "bigbench==1.0.0"
DEFAULT_ROOT = DEFAULT_CACHE_DIR / "paper"
PAPER_RESULTS = RESULTS / "paper"
_ARCHIVE = "bigbench-1.0.0.tar.gz"


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders of one study; nothing is made before it is written."""

    root: Path = DEFAULT_ROOT

    @property
    def archive(self) -> Path:
        return self.root / "source" / _ARCHIVE

    @property
    def splits(self) -> Path:
        return self.root / "splits"

    @property
    def adapters(self) -> Path:
        """One PEFT folder a task."""
        return self.root / "adapters"

    @property
    def rows(self) -> Path:
        """Raw answers, one file a run."""
        return self.root / "rows"

    @property
    def encoders(self) -> Path:
        return self.root / "encoders"

    def store_uri(self, name: str) -> str:
        return str(self.root / "stores" / name)


def fetch_archive(workspace: Workspace) -> Path:
    """The source distribution with all tasks, 358 MB, downloaded once by pip.

    Raises: subprocess.CalledProcessError: pip could not get it; its output says why.
    """
    path = workspace.archive
    if not path.exists():
        logger.info("pip downloads %s (358 MB) into %s", SOURCE, path.parent)
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(path.parent)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, SOURCE], check=True)
    return path
