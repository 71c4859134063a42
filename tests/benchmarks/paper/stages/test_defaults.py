"""`auto` with the server's defaults, on the tiny study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pandas as pd
import pytest

from benchmarks.paper.answering.methods import Nearest
from benchmarks.paper.answering.runs import run_all
from benchmarks.paper.stages import defaults
from benchmarks.paper.stages.stage import Loaded
from retriever_svc import Retriever, Route, RouteRequest
from retriever_svc.retriever import RouteAnswer


class Recording:
    """A Retriever that keeps its requests."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self.requests: list[RouteRequest] = []

    def route(self, requests: Sequence[RouteRequest]) -> list[RouteAnswer]:
        self.requests += requests
        return self._retriever.route(requests)


def test_auto_asks_as_a_request_without_options(loaded: Loaded) -> None:
    questions = loaded.bench.study.questions("test", 4)
    recording = Recording(loaded.bench.retriever)
    assert len(defaults.ARMS["auto"].plans(cast(Retriever, recording), questions)) == len(questions)
    assert recording.requests == [RouteRequest(question.item.input) for question in questions]


def test_the_three_nearest_are_different_adapters_and_the_first_is_selection(loaded: Loaded) -> None:
    bench = loaded.bench
    questions = bench.study.questions("test", 2)
    plans = [Nearest(place).plans(bench.retriever, questions) for place in range(3)]
    assert all(len({plan.adapters[0].ref for plan in own}) == 3 for own in zip(*plans, strict=True))
    routes = bench.retriever.route([RouteRequest(question.item.input, abstain="never") for question in questions])
    nearest = [route.candidates[0].ref for route in routes if isinstance(route, Route)]
    assert [plan.adapters[0].ref for plan in plans[0]] == nearest


def test_the_best_of_three_has_the_highest_score_of_each_question(loaded: Loaded, tmp_path: Path) -> None:
    rows = defaults.add_best(run_all(loaded.bench, defaults.ARMS, 2, tmp_path)).to_pandas()
    scores = rows.pivot(index=["task", "number"], columns="run", values="score")
    assert len(scores) == 6 and scores[list(defaults.PLACES)].max(axis=1).equals(scores[defaults.BEST].rename(None))
    assert scores["third"].mean() < 1


def test_losses_are_told_by_what_leads_the_plan() -> None:
    """`plural` and `past_tense` are of one cluster, `copy_letters` of another."""
    led = [("plural", 1.0), ("past_tense", 0.0), ("copy_letters", 0.0), (None, 0.5)]
    rows = [
        {"run": run, "task": "plural", "number": number, "score": score if run == "auto" else 1.0}
        | {"adapters": ["add_3digit", *filter(None, [name])] if name else [], "weights": [0.2, 0.8] if name else []}
        for run in ("auto", "own")
        for number, (name, score) in enumerate(led)
    ]
    found = [line.strip("| ").split(" | ") for line in defaults.losses_table(pd.DataFrame(rows)).splitlines()[2:]]
    assert {name: [float(cell) for cell in cells] for name, *cells in found} == {
        "the own adapter": pytest.approx([25, 0, 0]),
        "a sibling": pytest.approx([25, 100, 25]),
        "another adapter": pytest.approx([25, 100, 25]),
        "the base model": pytest.approx([25, 50, 12.5]),
    }
