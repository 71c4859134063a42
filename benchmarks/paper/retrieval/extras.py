"""What is measured with the untrained and the best encoder alone: samples, two bases, a growing pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

from benchmarks.paper.retrieval.bases import base_rows
from benchmarks.paper.retrieval.cells import BEST, Cells
from benchmarks.paper.retrieval.growth import growth_rows, latency_rows
from benchmarks.paper.retrieval.samples import sample_rows
from benchmarks.paper.retrieval.study import UNTRAINED, Task
from benchmarks.paper.steps import Step

Descriptions = Callable[[], Mapping[str, str]]


def extra_steps(cells: Cells, descriptions: Descriptions) -> list[Step]:
    """For when all rankings are there. `descriptions`: of each task of the pool."""
    best = cells.choose_best()
    return [*_steps_of(cells, UNTRAINED, UNTRAINED, descriptions), *_steps_of(cells, BEST, best, descriptions)]


def latency_step(cells: Cells) -> Step:
    """For a machine that does nothing else."""
    every = (*cells.study.tasks, *cells.study.spares)
    path = cells.rows / "latency.parquet"
    return Step("latency", path, _cost(every), lambda: latency_rows(cells.encoder(UNTRAINED), every))


def _steps_of(cells: Cells, name: str, label: str, descriptions: Descriptions) -> list[Step]:
    pool, every = cells.study.tasks, (*cells.study.tasks, *cells.study.spares)
    encoder = cache(partial(cells.encoder, name))  # loaded by the first step that runs
    measured = {
        "samples": (pool, lambda: sample_rows(encoder(), label, pool, descriptions())),
        "bases": (pool, lambda: base_rows(encoder(), label, pool)),
        "growth": (every, lambda: growth_rows(encoder(), label, every)),
    }
    return [
        Step(f"{what} {label}", cells.rows / f"{what}-{label}.parquet", _cost(tasks), run)
        for what, (tasks, run) in measured.items()
    ]


def _cost(tasks: Sequence[Task]) -> float:
    return sum(len(task.samples) + len(task.test) for task in tasks)
