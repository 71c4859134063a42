"""The measurement of `auto`, on the tiny study with the packaged encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from benchmarks import results_file
from benchmarks.paper.answering.answers import Asker
from benchmarks.paper.answering.auto import Auto
from benchmarks.paper.answering.runs import Bench, pool_retriever
from benchmarks.paper.answering.stores import packaged_encoder
from benchmarks.paper.answering.study import Study, Weights
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.stages import auto
from benchmarks.paper.stages.answer_tables import Answers
from lora_store import LoraStore
from retriever_svc import Route, RouteRequest

PER_TASK = 2
EVERYDAY = ["hello", "what is the capital of Peru?"]


@pytest.fixture(scope="module")
def served(study: Study, asked: tuple[Asker, LoraStore, Weights]) -> Bench:
    retriever = pool_retriever(study, asked[0], packaged_encoder(), "auto")
    return Bench(study, asked[0], retriever, Console(quiet=True))


@pytest.mark.parametrize("method", [Auto(), Auto("selection"), Auto(weighting="softmax"), Auto("fusion", "uniform")])
def test_in_distribution_the_plans_are_the_servers(served: Bench, method: Auto) -> None:
    questions = served.study.questions("test", 10)
    requests = [RouteRequest(q.item.input, strategy=method.strategy, weighting=method.weighting) for q in questions]
    routes = served.retriever.route(requests)
    for plan, route in zip(method.plans(served.retriever, questions), routes, strict=True):
        assert isinstance(route, Route)
        assert [(a.ref, round(a.weight, 9)) for a in plan.adapters] == [
            (a.ref, round(a.weight, 9)) for a in route.plan.adapters
        ]
        assert route.abstained == (not plan.adapters)


def test_out_of_distribution_the_own_adapter_is_never_chosen(served: Bench) -> None:
    questions = served.study.questions("test", 10)
    plans = Auto(masks_own=True, abstains=False).plans(served.retriever, questions)
    assert all(len(plan.adapters) == 2 for plan in plans)
    assert not any(a.ref.name == q.task for q, plan in zip(questions, plans, strict=True) for a in plan.adapters)


def test_a_smaller_lead_leaves_companions_more_weight(served: Bench) -> None:
    questions = served.study.questions("test", 3)
    for lead in (1.0, 4.0):
        for plan in Auto(temperature=100, min_lead=lead, abstains=False).plans(served.retriever, questions):
            assert plan.adapters[0].weight == pytest.approx(lead / (1 + lead))


def test_the_stage_writes_its_section_and_asks_nothing_twice(
    served: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    for _ in range(2):
        before = served.asker.engine.counters.num_requests
        write_parquet(tmp_path / auto.SWEEP, auto.run(served, auto.sweep(), PER_TASK, "choice"))
        write_parquet(tmp_path / auto.EVERYDAY, auto.everyday_rows(served, EVERYDAY))
        write_parquet(tmp_path / auto.ROWS, auto.run(served, auto.defaults(), PER_TASK, "test"))
    assert served.asker.engine.counters.num_requests == before
    auto.write_tables(tmp_path)
    text = (tmp_path / "auto.md").read_text()
    assert "| evidence_0.05 |" in text and "| stream_over_oracle |" in text
    everyday = pd.read_parquet(tmp_path / auto.EVERYDAY)
    assert everyday[everyday["abstained"]]["same"].all()
    write_parquet(tmp_path / auto.FRESH, auto.everyday_rows(served, EVERYDAY[:1]))
    auto.write_tables(tmp_path)
    assert "The same with 1 everyday prompts" in (tmp_path / "auto.md").read_text()
    assert "auto_fresh_to_base" in json.loads((tmp_path / "paper" / "results.json").read_text())["figures"]


def test_the_stream_compares_with_an_oracle_that_never_errs() -> None:
    rows = [
        {"run": run, "task": task, "number": number, "score": score}
        for run, scores in (("auto_iid", (1.0, 0.0)), ("auto_iid_always", (1.0, 1.0)))
        for task in ("a", "b")
        for number, score in enumerate(scores)
    ]
    found = auto.stream(Answers(pd.DataFrame(rows), {}), [True, True, True, False])
    assert found["stream"].mean == pytest.approx((0.5 + 0.75) / 2)
    assert found["oracle"].mean == pytest.approx(1.0)
    assert found["stream_over_oracle"].mean == pytest.approx(0.625)
    assert found["stream"].low < 0.625 < found["stream"].high and np.isfinite(found["oracle"].low)
