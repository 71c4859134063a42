"""How representative the training tasks of an encoder were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from benchmarks.paper.common.resumable import Step
from benchmarks.paper.retrieval.experiments import Experiments
from benchmarks.paper.retrieval.ranking import embedded
from benchmarks.paper.retrieval.study import UNTRAINED, Draw, Task
from retriever_svc import Encoder


def draws_step(experiments: Experiments) -> Step:
    study, path = experiments.study, experiments.rows / "draws.parquet"
    cost = sum(len(task.samples) for task in study.tasks)
    return Step("draws", path, cost, lambda: draw_rows(experiments.encoder(UNTRAINED), study.tasks, study.draws()))


def draw_rows(untrained: Encoder, tasks: Sequence[Task], draws: Sequence[Draw]) -> pa.Table:
    """Return a row for each draw and task: whether the task and its cluster were seen, and the nearest seen task.

    `nearest_seen`: the cosine of the untrained encoder's embeddings of the two tasks.
    """
    found = embedded(untrained, {task.name: task.samples for task in tasks})
    vectors = np.stack([found[task.name].vector for task in tasks])
    cosines = vectors @ vectors.T - 3 * np.eye(len(tasks), dtype=np.float32)  # never the task itself
    rows = []
    for draw in draws:
        seen = np.array([task.name in draw.tasks for task in tasks])
        clusters = {task.cluster for task in tasks if task.name in draw.tasks}
        nearest_seen = np.where(seen, cosines, -2).max(axis=1)
        about = {"draw": draw.name, "share": draw.share, "seed": draw.seed, "whole_clusters": draw.whole_clusters}
        for task, was_seen, cosine in zip(tasks, seen.tolist(), nearest_seen.tolist(), strict=True):
            own = {"task": task.name, "cluster": task.cluster, "cluster_seen": task.cluster in clusters}
            rows.append({**about, **own, "seen": was_seen, "nearest_seen": cosine})
    return pa.Table.from_pylist(rows)
