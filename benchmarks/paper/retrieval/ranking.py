"""Queries ranked by the server's own index, over adapters embedded by its own encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.paper.retrieval.study import Task
from benchmarks.pool_scale import record_of
from lora_store import AdapterRecord, Embedding, Sample
from retriever_svc import AdapterIndex, Encoder, embed_groups

DEPTHS = (1, 3, 5, 8)
SCORES = ("cosine", "inner product")
DEPTH = max(DEPTHS) + 1  # one more: with the own adapter masked, as many are left


def embedded(encoder: Encoder, samples: Mapping[str, Sequence[str]], score: str) -> dict[str, Embedding]:
    """Each name's embedding by its samples.

    `inner product`: the mean of the samples' unit vectors as it is, whose product with a query is the paper's code's
    score; `cosine`: scaled to length 1, as the server does it and the paper writes it.
    """
    groups = [[Sample(text) for text in own] for own in samples.values()]
    found = dict(zip(samples, embed_groups(encoder, groups), strict=True))
    embeddings = {name: embedding for name, embedding in found.items() if embedding is not None}
    if score == "cosine":
        return embeddings
    return {
        name: Embedding(one.encoder, encoder.encode(samples[name]).mean(axis=0), one.own_scores)
        for name, one in embeddings.items()
    }


def records_of(embeddings: Mapping[str, Embedding], tags: Sequence[str] = ()) -> list[AdapterRecord]:
    return [record_of(name, embedding, tuple(tags)) for name, embedding in embeddings.items()]


def index_of(encoder: Encoder, samples: Mapping[str, Sequence[str]], score: str = "cosine") -> AdapterIndex:
    return AdapterIndex.of(records_of(embedded(encoder, samples, score)), encoder.dim)


def nearest(
    index: AdapterIndex, vectors: np.ndarray, depth: int = DEPTH, tags: Collection[str] = ()
) -> list[list[str]]:
    """The names of the best `depth` adapters that carry `tags`, per query (N, D), best first."""
    found = index.search(vectors, depth, index.allowed(tags=tags))
    return [[match.record.ref.name for match in matches] for matches in found]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a query's own adapter stands, 0 for nowhere; without it, how many of the best 1 and 3 share its cluster."""

    own: int
    cluster_of_1: int
    cluster_of_3: int


def place_of(task: Task, names: Sequence[str], cluster_of: Mapping[str, str]) -> Place:
    others = [cluster_of[name] == task.cluster for name in names if name != task.name]
    own = names.index(task.name) + 1 if task.name in names else 0
    return Place(own, sum(others[:1]), sum(others[:3]))


def hit_share(places: np.ndarray, depth: int) -> float:
    """Of queries whose own adapter is among the first `depth`; places as `Place.own`."""
    return float(((places > 0) & (places <= depth)).mean())


def rank_rows(encoder: Encoder, name: str, tasks: Sequence[Task], parts: Sequence[str]) -> pa.Table:
    """A row for each score and query of `parts` (`test`, `choice`): its `Place`."""
    cluster_of = {task.name: task.cluster for task in tasks}
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    for score in SCORES:
        index = index_of(encoder, {task.name: task.samples for task in tasks}, score)
        for task, part in product(tasks, parts):
            found = nearest(index, encoder.encode(getattr(task, part)))
            places = [place_of(task, names, cluster_of) for names in found]
            for column, word in {"encoder": name, "score": score, "part": part, "task": task.name}.items():
                columns[column] += [word] * len(places)
            columns["query"] += range(len(places))
            for field in fields(Place):
                columns[field.name] += [getattr(place, field.name) for place in places]
    words, numbers = pa.dictionary(pa.int16(), pa.string()), pa.int16()
    types = {column: words if isinstance(rows[0], str) else numbers for column, rows in columns.items()}
    return pa.table({column: pa.array(rows, types[column]) for column, rows in columns.items()})
