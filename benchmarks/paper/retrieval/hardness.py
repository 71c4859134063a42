"""Measure encoders whose training weighs hard negatives more, against the plain training on the same tasks.

Every batch has a text of each training task, so the nearest other tasks are among the negatives already. The hardness
makes them count more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.resumable import Step
from benchmarks.paper.retrieval.experiments import Experiments
from benchmarks.paper.retrieval.ranking import COSINE, rank_rows
from benchmarks.paper.retrieval.study import Draw

KIND = "hardness"
STRENGTHS = (0.0, 2.0, 8.0)
_PLAIN = 0.0


def hardness_steps(experiments: Experiments) -> list[Step]:
    """Return a step for each draw of the paper's share of tasks and each strength."""
    cost = sum(len(task.samples) + len(task.choice) + len(task.test) for task in experiments.study.tasks)

    def rows(draw: Draw, strength: float) -> pa.Table:
        name = experiments.train(draw, strength)
        found = rank_rows(experiments.encoder(name), draw.name, experiments.study.tasks, ("test", "choice"))
        kept = found.filter(pc.equal(found["score"].cast(pa.string()), COSINE))
        return kept.append_column("strength", pa.array([strength] * len(kept), pa.float32()))

    return [
        Step(
            f"{KIND} {strength:g} {draw.name}",
            experiments.rows / f"{KIND}-{draw.name}-{strength:g}.parquet",
            5 * cost,
            lambda draw=draw, strength=strength: rows(draw, strength),
        )
        for draw in experiments.study.draws()
        if draw.is_main
        for strength in STRENGTHS
    ]


def hits(rows: pd.DataFrame, strength: float, part: str = "test") -> np.ndarray:
    """Return (draws, tasks, queries): 1 if the own adapter is first. Tasks with fewer queries are left out."""
    own = rows[(rows["strength"] == strength) & (rows["part"] == part)]
    grids = [
        found.pivot(index="task", columns="query", values="own").dropna()
        for _, found in own.astype({"encoder": str, "task": str}).groupby("encoder")
    ]
    return np.stack([(grid == 1).to_numpy(float) for grid in grids])


def chosen(rows: pd.DataFrame) -> float:
    """Return the strength above 0 that is best on the `choice` queries; of equal ones the lowest."""
    strengths = sorted(set(rows["strength"]) - {_PLAIN})
    return max(strengths, key=lambda strength: float(hits(rows, strength, "choice").mean()))


def gain(rows: pd.DataFrame) -> Interval:
    """Return the points of top-1 of the chosen strength over the plain training, on the `test` queries."""
    return bootstrap(hits(rows, chosen(rows)) - hits(rows, _PLAIN), resamples_tasks=True)


def section(folder: Path) -> str:
    """Return the table of all strengths and the gain of the chosen one."""
    rows = pd.read_parquet(folder / f"retrieval_{KIND}.parquet")
    lines = [
        [f"{strength:g}", *[bootstrap(hits(rows, strength, part)).in_percent() for part in ("choice", "test")]]
        for strength in sorted(set(rows["strength"]))
    ]
    words = (
        "Encoders trained on 40 % of the tasks, cosine, top-1 in percent. The strength times the cosine is added to the"
        f" logits of negatives (0: plain). The best on `choice`, {chosen(rows):g}, differs from the plain training by"
        f" {gain(rows).in_percent()} points on `test`.\n"
    )
    return f"{words}\n{table(['strength', '`choice`', '`test`'], lines)}"
