"""Failures below a LivePool cost time, but no adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from retriever_svc import SavedIndexes
from retriever_svc.pool import Pool
from retriever_svc.saved_index import SavedLists
from tests.retriever_svc.live_pools import ENCODER, TINY, assert_finds_exactly, records_of, saved_in
from tests.retriever_svc.pool_fakes import Later, Source, live_pool


def test_a_generation_that_cannot_be_derived_is_built_from_scratch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object) -> Pool:
        raise MemoryError

    records = records_of(6)
    source = Source(*records[:3])
    pools = live_pool(ENCODER, source)
    monkeypatch.setattr(Pool, "after", no_memory)
    source.commit(*records[1:])
    assert pools.catch_up() == 2
    assert_finds_exactly(pools, records[1:])
    assert "building a new one" in caplog.text


def test_a_saved_index_of_another_release_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unreadable(SavedIndexes):
        def newest(self, encoder: str) -> SavedLists | None:
            raise RuntimeError("index type not recognized")

    records, later = records_of(70), Later()
    unreadable = Unreadable(saved_in(tmp_path)._files)
    pools = live_pool(ENCODER, Source(*records), settings=TINY, background=later, saved=unreadable)
    assert_finds_exactly(pools, records)
    assert "cannot use the saved index" in caplog.text
