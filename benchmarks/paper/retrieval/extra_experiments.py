"""Measurements with the untrained and the best encoder only: samples, two base models, a growing pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

from benchmarks.paper.common.resumable import Step
from benchmarks.paper.retrieval.bases import base_rows
from benchmarks.paper.retrieval.experiments import BEST, Experiments
from benchmarks.paper.retrieval.growth import growth_rows, latency_rows
from benchmarks.paper.retrieval.samples import sample_rows
from benchmarks.paper.retrieval.study import UNTRAINED, Task

Descriptions = Callable[[], Mapping[str, str]]


def extra_steps(experiments: Experiments, descriptions: Descriptions) -> list[Step]:
    """Return the steps that need all rankings. `descriptions`: of each task of the pool."""
    best = experiments.choose_best()
    labels = {UNTRAINED: UNTRAINED, BEST: best}
    return [step for name, label in labels.items() for step in _steps_of(experiments, name, label, descriptions)]


def latency_step(experiments: Experiments) -> Step:
    """Return the step that measures latencies. It needs an idle machine."""
    every = (*experiments.study.tasks, *experiments.study.spares)
    path = experiments.rows / "latency.parquet"
    return Step("latency", path, _cost(every), lambda: latency_rows(experiments.encoder(UNTRAINED), every))


def _steps_of(experiments: Experiments, name: str, label: str, descriptions: Descriptions) -> list[Step]:
    pool, every = experiments.study.tasks, (*experiments.study.tasks, *experiments.study.spares)
    encoder = cache(partial(experiments.encoder, name))  # loaded by the first step that runs
    measured = {
        "samples": (pool, lambda: sample_rows(encoder(), label, pool, descriptions())),
        "bases": (pool, lambda: base_rows(encoder(), label, pool)),
        "growth": (every, lambda: growth_rows(encoder(), label, every)),
    }
    return [
        Step(f"{what} {label}", experiments.rows / f"{what}-{label}.parquet", _cost(tasks), run)
        for what, (tasks, run) in measured.items()
    ]


def _cost(tasks: Sequence[Task]) -> float:
    return sum(len(task.samples) + len(task.test) for task in tasks)
