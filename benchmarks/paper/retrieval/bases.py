"""Measure one index over the adapters of two base models: the value of a filter by base.

Each request is for one base. An adapter of the other base cannot answer it, however similar it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from benchmarks.paper.retrieval.ranking import embedded, nearest, records_of
from benchmarks.paper.retrieval.study import Task
from retriever_svc import AdapterIndex, Encoder

BASES = ("a", "b")
TOP_K = 3


def base_rows(encoder: Encoder, name: str, tasks: Sequence[Task]) -> pa.Table:
    """Return a row for each pool, base of the request and filter.

    Pools: every task has an adapter of either base, embedded by different samples; or each base has adapters of half of
    the tasks only, drawn separately, so that a related task's adapter may exist for the wrong base only. `own`: the
    task's adapter of the request's base is among the best k; only tasks that have it are queried. `usable`: the share
    of the best 3 that the request's base can run.
    """
    rows = []
    for pool, held in (("all of both", _all(tasks)), ("half of either", _halves(tasks))):
        index = _index(encoder, tasks, held)
        for base in BASES:
            asked = [task for task in tasks if task.name in held[base]]
            for filtered in (False, True):
                tags = (f"base-{base}",) if filtered else ()
                measured = _measured(index, encoder, asked, base, tags)
                rows.append({"encoder": name, "pool": pool, "base": base, "filtered": filtered, **measured})
    return pa.Table.from_pylist(rows)


def _all(tasks: Sequence[Task]) -> dict[str, set[str]]:
    return {base: {task.name for task in tasks} for base in BASES}


def _halves(tasks: Sequence[Task]) -> dict[str, set[str]]:
    names = [task.name for task in tasks]
    return {base: set(random.Random(seed).sample(names, len(names) // 2)) for seed, base in enumerate(BASES)}


def _index(encoder: Encoder, tasks: Sequence[Task], held: Mapping[str, set[str]]) -> AdapterIndex:
    records = []
    for base in BASES:
        samples = {
            f"{base}.{task.name}": task.samples if base == BASES[0] else task.more_samples
            for task in tasks
            if task.name in held[base]
        }
        records += records_of(embedded(encoder, samples), (f"base-{base}",))
    return AdapterIndex.of(records, encoder.dim)


def _measured(
    index: AdapterIndex, encoder: Encoder, asked: Sequence[Task], base: str, tags: Sequence[str]
) -> dict[str, float]:
    found = [(task, names) for task in asked for names in nearest(index, encoder.encode(task.test), TOP_K, tags)]
    own = np.array([[f"{base}.{task.name}" in names[:depth] for depth in (1, TOP_K)] for task, names in found])
    task_alone = [task.name == names[0].partition(".")[2] for task, names in found]
    usable = [np.mean([name.startswith(f"{base}.") for name in names]) for _, names in found]
    return {
        "own_top1": float(own[:, 0].mean()),
        "own_top3": float(own[:, 1].mean()),
        "task_top1": float(np.mean(task_alone)),
        "usable": float(np.mean(usable)),
    }
