"""A retriever built from the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.config.app import AppConfig, RetrievalSettings
from deployments.retriever_factory import live_pool, retriever_over
from lora_store import AdapterRecord, Embedding, Snapshot
from lora_store.adapter import AdapterRef
from lora_store.events import Rank
from lora_store.rankings import OUTCOME, Ranking
from retriever_svc import Encoder, IndexSettings, NoAdapterMatched, Route, RouteRequest
from retriever_svc.packaged_encoder import CONVERSION
from retriever_svc.saved_network import SavedEncoder
from tests.deployments.adapter_records import BASE, adapter
from tests.tiny_encoder import save_tiny_encoder

TEXT = "the goat eats"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture(scope="module")
def record(encoder: Path) -> AdapterRecord:
    """Return an adapter of another tenant that is near every text."""
    own = Encoder(str(encoder), num_threads=1)
    [vector] = own.encode([TEXT])
    embedding = Embedding(own.identity, vector / np.linalg.norm(vector), np.ones(2, np.float32))
    return replace(adapter("goats", tenant="acme"), embedding=embedding, approved=False)


Router = Callable[..., Route | Exception]


@pytest.fixture
def route(encoder: Path, tmp_path: Path) -> Router:
    """Return a function that routes a text to a record with these settings."""

    def route(record: AdapterRecord, *ranks: Rank, min_score: float = -1.0, **settings: Any) -> Route | Exception:
        retrieval = RetrievalSettings(encoder=str(encoder), encoder_threads=1, min_score=min_score)
        config = AppConfig(retrieval=retrieval, **{"store_uri": str(tmp_path), "accepts_base": (BASE,), **settings})
        pools = live_pool(config, lambda: Snapshot(1, {("acme", "goats"): record}, rankings={"local": ranks}))
        [outcome] = retriever_over(pools, config).route([RouteRequest(TEXT, tenant="local")])
        return outcome

    return route


def names(outcome: Route | Exception) -> list[str]:
    assert isinstance(outcome, Route)
    return [row.ref.name for row in outcome.plan.adapters]


def test_the_encoder_and_the_floor_of_the_settings_are_the_retrievers(route: Router, record: AdapterRecord) -> None:
    outcome = route(record)
    assert names(outcome) == ["goats"]
    assert isinstance(outcome, Route) and outcome.candidates[0].score == pytest.approx(1.0, abs=0.2)
    assert record.embedding is not None
    opposite = replace(record.embedding, vector=-record.embedding.vector)
    outcome = route(replace(record, embedding=opposite), min_score=1.0)
    assert isinstance(outcome, NoAdapterMatched) or outcome.abstained  # type: ignore[union-attr]


def test_the_settings_decide_whether_approval_is_required(route: Router, record: AdapterRecord) -> None:
    for is_approved, found in ((False, []), (True, ["goats"])):
        assert names(route(replace(record, approved=is_approved), public_requires_approval=True)) == found


def test_adapters_of_a_base_that_the_settings_do_not_accept_are_skipped_and_logged(
    route: Router, record: AdapterRecord, caplog: pytest.LogCaptureFixture
) -> None:
    for accepted in ({"accepts_base": (BASE,)}, {"base_model": f"somewhere/{BASE}", "accepts_base": ()}):
        assert names(route(record, **accepted)) == ["goats"]
    assert "not served" not in caplog.text
    assert names(route(record, accepts_base=())) == []
    assert f"1 adapter was made for {BASE} and is not served" in caplog.text
    assert names(route(replace(record, base_model=""), accepts_base=())) == ["goats"]


def test_outcomes_that_were_applied_count_only_while_the_settings_say_so(route: Router, record: AdapterRecord) -> None:
    assert record.embedding is not None
    anchor, none = AdapterRef("local", f"{OUTCOME}1", ""), np.empty(0, np.float32)
    said = Ranking(anchor, (), record.embedding.encoder, record.embedding.vector, none)  # the base model was better
    rank = Rank("local", said, True, "me", datetime(2026, 1, 2, tzinfo=UTC))
    for learning, found in (("apply", []), ("observe", ["goats"]), ("off", ["goats"])):
        assert names(route(record, rank, learning=learning)) == found


def test_the_doctor_judges_as_many_candidates_as_the_settings_say(encoder: Path, tmp_path: Path) -> None:
    retrieval = RetrievalSettings(encoder=str(encoder), encoder_threads=1, k=5)
    config = AppConfig(store_uri=str(tmp_path), retrieval=retrieval)
    [step] = retriever_over(live_pool(config, lambda: Snapshot(1, {})), config).doctor("local", lambda record: [])
    assert step.report is not None and step.report.top_k == 5


def test_an_index_is_built_with_the_sizes_that_are_given(encoder: Path, tmp_path: Path, record: AdapterRecord) -> None:
    """With these sizes, lists are built even for a pool of one adapter."""
    retrieval = RetrievalSettings(encoder=str(encoder), encoder_threads=1)
    config = AppConfig(store_uri=str(tmp_path), accepts_base=(BASE,), retrieval=retrieval)

    def has_lists(index: IndexSettings | None) -> bool:
        built = live_pool(config, lambda: Snapshot(1, {("acme", "goats"): record}), index).current.index
        return built.wants_lists or built.lists is not None  # lists are trained in the background

    assert [has_lists(None), has_lists(IndexSettings(exact_rows=0, side_rows=0))] == [False, True]


def test_float32_is_computed_without_torch_where_the_encoder_is_the_packaged_one(encoder: Path, tmp_path: Path) -> None:
    (encoder / CONVERSION).write_text("a conversion\n")
    retrieval = RetrievalSettings(encoder=str(encoder), encoder_threads=1, encoder_dtype="float32")
    config = AppConfig(retrieval=retrieval, store_uri=str(tmp_path), accepts_base=(BASE,))
    Encoder(encoder, dtype="float32", exact_by="openvino")  # the first start saves the network
    pool = live_pool(config, lambda: Snapshot(1, {}))
    assert isinstance(pool.current.encoder._model, SavedEncoder)
