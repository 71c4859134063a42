"""The screenshots of the console: the command that takes them, and their use in the documentation."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from docs.screenshots import FOLDER, take
from gpu_worker.config import PACKAGED_MODEL
from tests.browsing import Browsing, address_of
from tests.deployments.adapter_records import adapter, pool_of
from tests.deployments.app_fakes import serve_plainly
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.fake_store import FakeStore
from tests.soak import Scale

MAX_BYTES = 600_000  # of all together
DOCS = FOLDER.parent


@pytest.mark.browser
def test_the_command_takes_every_screenshot_of_the_documentation(
    browsing: Browsing, tmp_path: Path, scale: Scale
) -> None:
    if not scale.is_full:
        pytest.skip("no part of the product: in make soak")
    held = [adapter(name) for name in ("sentence_negation", "past_tense", "date_format")]

    async def run() -> None:
        retriever = MappedRetriever(held)
        store = FakeStore(pool_of(*held, *(adapter(one.ref.name, version="older", generation=0) for one in held)))
        served = serve_plainly(
            worker=CountingWorker(), retriever=retriever, store=store, accepts_base=(PACKAGED_MODEL,)
        )
        async with address_of(served) as url:
            await take(url, tmp_path)

    asyncio.run(run())
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {path.name for path in FOLDER.iterdir()}
    assert all(content[:4] == b"RIFF" and content[8:12] == b"WEBP" for content in files.values())
    assert all(len(content) > 2_000 for content in files.values())


def test_every_screenshot_is_shown_and_small() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    names = [path.name for path in FOLDER.iterdir()]
    assert len(names) > 5
    assert [name for name in names if f"../console/{name})" not in pages] == []
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_BYTES
