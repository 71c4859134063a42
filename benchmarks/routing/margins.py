"""Choose two margins on the `choice` part of the paper's study: `python -m benchmarks.routing.margins`.

- `NEAR` of `retriever_svc.competence`: how near two adapters of one task are, found by different samples, and how many
  adapters of other tasks are as near.
- `STICKY_MARGIN` of `retriever_svc.route`: how many turns about the task of the previous turn keep its adapter, and how
  many turns about another task wrongly do.

Nothing is generated, and no test question is read. Downloads BIG-bench (358 MB) once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace
from benchmarks.paper.retrieval.loading import load_experiments
from benchmarks.paper.retrieval.projected import projected_encoders
from benchmarks.paper.retrieval.ranking import embedded
from benchmarks.paper.retrieval.study import UNTRAINED, Task
from benchmarks.results_file import write_results
from retriever_svc import Encoder

NEAR = (0.4, 0.5, 0.6, 0.7, 0.8)
MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
_TOP_K = 3  # candidates; an adapter that is not among them cannot stay
out = Console(width=120)


def nearness(adapters: np.ndarray, twins: np.ndarray, near: float) -> tuple[float, float]:
    """Return (share of twins at least as near as `near` to their adapter, adapters of other tasks as near, on average).

    `adapters`, `twins`: unit rows (A, D); row i of both is of one task.
    """
    cosines = twins @ adapters.T
    others = (cosines >= near) & ~np.eye(len(adapters), dtype=bool)
    return float((np.diag(cosines) >= near).mean()), float(others.sum(axis=1).mean())


def stickiness(adapters: np.ndarray, prompts: Sequence[np.ndarray], margin: float) -> tuple[float, float]:
    """Return (share of prompts with their adapter if the previous turn had it, share of those with another that stay).

    `prompts`: for each adapter, unit rows (n, D). The second share is over prompts whose own adapter is first, and over
    every other adapter as that of the previous turn.
    """
    kept, held, switches = [], 0, 0
    for own, rows in enumerate(prompts):
        scores = rows @ adapters.T
        order = np.argsort(-scores, axis=1)
        stays = (scores >= scores.max(axis=1, keepdims=True) - margin) & _among_first(order)
        kept += list(stays[:, own])
        is_first = order[:, 0] == own
        held += int(stays[is_first].sum() - is_first.sum())
        switches += int(is_first.sum()) * (len(adapters) - 1)
    return float(np.mean(kept)), held / max(switches, 1)


def _among_first(order: np.ndarray) -> np.ndarray:
    """Return whether each adapter is among the first `_TOP_K` of each row of `order`, which has the best one first."""
    found = np.zeros(order.shape, bool)
    np.put_along_axis(found, order[:, :_TOP_K], values=True, axis=1)
    return found


def rows_of(tasks: Sequence[Task], encoders: Iterable[tuple[str, Encoder]]) -> list[dict[str, object]]:
    """Return a row for each projection, margin and value: its two shares."""
    samples = {task.name: task.samples for task in tasks}
    rows: list[dict[str, object]] = []
    for projection, projected in encoders:
        adapters = _vectors(projected, samples)
        twins = _vectors(projected, {task.name: task.more_samples for task in tasks})
        prompts = [projected.encode(task.choice) for task in tasks]
        for near in NEAR:
            share, others = nearness(adapters, twins, near)
            rows.append({"projection": projection, "margin": "near", "value": near, "own": share, "others": others})
        for margin in MARGINS:
            kept, held = stickiness(adapters, prompts, margin)
            rows.append({"projection": projection, "margin": "sticky", "value": margin, "own": kept, "others": held})
    return rows


def _vectors(encoder: Encoder, samples: Mapping[str, Sequence[str]]) -> np.ndarray:
    return np.stack([embedding.vector for embedding in embedded(encoder, samples).values()])


def main(root: Path = DEFAULT_ROOT) -> None:
    """Measure both margins, print the table and write results/routing_margins."""
    experiments = load_experiments(Workspace(root))
    tasks = experiments.study.tasks
    encoders = projected_encoders(experiments.encoder(UNTRAINED), {task.name: task.samples for task in tasks})
    rows = rows_of(tasks, encoders)
    table = Table(*rows[0], title="near: twins found, others found; sticky: adapter kept, wrongly kept")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    with out.capture() as captured:
        out.print(table)
    out.print(table)
    figures = {
        f"{row['margin']}_{row['value']}_{row['projection']}_{name}": float(str(row[name]))
        for row in rows
        for name in ("own", "others")
    }
    write_results("routing_margins", figures=figures, table=captured.get(), runs=rows)


if __name__ == "__main__":
    typer.run(main)
