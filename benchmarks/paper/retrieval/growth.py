"""Measure retrieval while the pool grows from ten real tasks to all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from benchmarks.paper.retrieval.ranking import DEPTHS, embedded, hit_share, nearest, records_of
from benchmarks.paper.retrieval.study import Task
from retriever_svc import AdapterIndex, Encoder

SIZES = (10, 20, 48, 96, 144, 190)
NUM_ORDERS = 5  # in which tasks are added
_NUM_TIMED, _TOP_K = 500, 3


def growth_rows(encoder: Encoder, name: str, tasks: Sequence[Task]) -> pa.Table:
    """Return a row for each order and size: hits of the test queries of the tasks in the pool, and of the first ten.

    One index grows by `after`, as a live pool does.
    """
    records = dict(zip([task.name for task in tasks], _records(encoder, tasks), strict=True))
    vectors = {task.name: encoder.encode(task.test) for task in tasks}
    rows = []
    for order in range(NUM_ORDERS):
        coming = random.Random(order).sample(list(tasks), len(tasks))
        index, size = AdapterIndex.of([], encoder.dim), 0
        for wanted in _sizes(tasks):
            index = index.after([], [records[task.name] for task in coming[size:wanted]])
            size = wanted
            places = {task.name: _places(index, task, vectors[task.name]) for task in coming[:size]}
            first = np.concatenate([places[task.name] for task in coming[: SIZES[0]]])
            together = np.concatenate(list(places.values()))
            rows.append(
                {
                    "encoder": name,
                    "order": order,
                    "size": size,
                    **{f"top{depth}": hit_share(together, depth) for depth in DEPTHS},
                    **{f"first_top{depth}": hit_share(first, depth) for depth in DEPTHS},
                    "index_bytes": index.num_bytes,
                }
            )
    return pa.Table.from_pylist(rows)


def _records(encoder: Encoder, tasks: Sequence[Task]) -> list:
    return records_of(embedded(encoder, {task.name: task.samples for task in tasks}))


def _places(index: AdapterIndex, task: Task, vectors: np.ndarray) -> np.ndarray:
    found = nearest(index, vectors, max(DEPTHS))
    return np.array([names.index(task.name) + 1 if task.name in names else 0 for names in found])


def latency_rows(encoder: Encoder, tasks: Sequence[Task]) -> pa.Table:
    """Return a row for each size: median ms of encoding one new text, and of its search for the best 3."""
    queries = [text for task in tasks for text in task.test]
    queries = random.Random(0).sample(queries, min(_NUM_TIMED, len(queries)))
    times = [_timed(lambda text=text: encoder.encode([text])) for text in queries]
    vectors, records = np.split(encoder.encode(queries), len(queries)), _records(encoder, tasks)
    rows = []
    for size in _sizes(tasks):
        search_ms = _search_ms(AdapterIndex.of(records[:size], encoder.dim), vectors)
        rows.append({"size": size, "encode_ms": float(np.median(times)), "search_ms": search_ms})
    return pa.Table.from_pylist(rows)


def _search_ms(index: AdapterIndex, queries: Sequence[np.ndarray]) -> float:
    allowed = index.allowed()
    return float(np.median([_timed(lambda one=one: index.search(one, _TOP_K, allowed)) for one in queries]))


def _sizes(tasks: Sequence[Task]) -> list[int]:
    return [*(size for size in SIZES if size < len(tasks)), len(tasks)]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)
