"""A server for the tests that only use it, until a test of `test_stopping.py`, the last file, stops it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lora_store.location import DEFAULT_CACHE_DIR
from tests.cluster.scaling_app import serving, settings_of
from tests.e2e.starter_pool import EXAMPLES
from tests.served_engine import ENGINE
from tests.servers.started import MOST_WORKERS, TOKEN, Started, in_home


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder with a short path, because Ray's sockets need one."""
    with tempfile.TemporaryDirectory(prefix="lr-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def started() -> Iterator[Started]:
    """Yield a server with the settings of `make serve`, one worker, or more under load, and its own process group.

    Its home has a token that others may read.
    """
    with tempfile.TemporaryDirectory(prefix="lr-", dir="/tmp") as name:
        folder = Path(name)
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text(TOKEN)
        (folder / ".ray" / "auth_token").chmod(0o644)
        (folder / ".cache").mkdir()
        (folder / ".cache" / DEFAULT_CACHE_DIR.name).symlink_to(DEFAULT_CACHE_DIR)  # no kernel is compiled again
        settings = settings_of(folder, min_workers=1, max_workers=MOST_WORKERS)
        starter = yaml.safe_load((EXAMPLES / ("starter.yaml" if ENGINE == "native" else "vllm.yaml")).read_text())
        settings = starter | settings | {"worker": starter["worker"] | settings["worker"]}
        with serving(folder, settings, in_home(folder, "disabled"), leads_group=True) as (url, process):
            yield Started(url, process, folder)
