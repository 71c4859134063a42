"""Measure how many samples an adapter needs, and how well its description alone retrieves it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from benchmarks.paper.retrieval.ranking import DEPTHS, hit_share, index_of, nearest, place_of
from benchmarks.paper.retrieval.study import Task
from retriever_svc import Encoder

NUM_SAMPLES = (1, 5, 10, 20)
NUM_DRAWS = 5  # draws of the samples
DESCRIPTION = 0  # instead of a number of samples


def sample_rows(encoder: Encoder, name: str, tasks: Sequence[Task], descriptions: Mapping[str, str]) -> pa.Table:
    """Return hits of the test queries, a row for each number of samples and draw; 0 samples: the description."""
    rows = []
    for number in NUM_SAMPLES:
        for draw in range(NUM_DRAWS if number < len(tasks[0].samples) else 1):
            rng = random.Random(draw)
            chosen = {task.name: rng.sample(task.samples, min(number, len(task.samples))) for task in tasks}
            rows.append({"num_samples": number, "draw": draw, **_hits(encoder, tasks, chosen)})
    alone = {task.name: [descriptions[task.name]] for task in tasks}
    rows.append({"num_samples": DESCRIPTION, "draw": 0, **_hits(encoder, tasks, alone)})
    return pa.Table.from_pylist([{"encoder": name, **row} for row in rows])


def _hits(encoder: Encoder, tasks: Sequence[Task], samples: Mapping[str, Sequence[str]]) -> dict[str, float]:
    index, cluster_of = index_of(encoder, samples), {task.name: task.cluster for task in tasks}
    places = [
        place_of(task, names, cluster_of).own for task in tasks for names in nearest(index, encoder.encode(task.test))
    ]
    return {f"top{depth}": hit_share(np.asarray(places), depth) for depth in DEPTHS}
