"""Rank queries with the server's own index, over adapters embedded by its own encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.paper.retrieval.study import Task
from benchmarks.pool_scale import Source, record_of
from lora_store import AdapterRecord, Embedding, Sample
from retriever_svc import AdapterIndex, Encoder, LivePool, ProjectionFiles, Retriever, embed_groups

DEPTHS = (1, 3, 5, 8)
SCORES = COSINE, PRODUCT = "cosine", "inner product"
DEPTH = max(DEPTHS) + 1  # one more, for use with the own adapter masked


def embedded(encoder: Encoder, samples: Mapping[str, Sequence[str]]) -> dict[str, Embedding]:
    """Return each name's embedding by its samples, as the server computes it."""
    groups = [[Sample(text) for text in own] for own in samples.values()]
    found = zip(samples, embed_groups(encoder, groups), strict=True)
    return {name: embedding for name, embedding in found if embedding is not None}


def records_of(embeddings: Mapping[str, Embedding], tags: Sequence[str] = ()) -> list[AdapterRecord]:
    return [record_of(name, embedding, tuple(tags)) for name, embedding in embeddings.items()]


def index_of(encoder: Encoder, samples: Mapping[str, Sequence[str]]) -> AdapterIndex:
    return AdapterIndex.of(records_of(embedded(encoder, samples)), encoder.dim)


def retriever_of(samples: Mapping[str, Sequence[str]], encoder: Encoder) -> Retriever:
    """Return a Retriever over adapters with these samples and no weights. The encoder keeps its projection."""
    source = Source(records_of(embedded(encoder, samples)))
    return Retriever(LivePool(lambda _: encoder, source, projections=ProjectionFiles(), projection="none"))


def nearest(
    index: AdapterIndex, vectors: np.ndarray, depth: int = DEPTH, tags: Collection[str] = ()
) -> list[list[str]]:
    """Return, per query (N, D), the names of the best `depth` adapters that have `tags`, by cosine, best first."""
    found = index.search(vectors, depth, index.allowed(tags=tags))
    return [[match.record.ref.name for match in matches] for matches in found]


def nearest_by_product(index: AdapterIndex, vectors: np.ndarray, lengths: Mapping[str, float]) -> list[list[str]]:
    """Return the same by the inner product with the samples' mean, not scaled, over all adapters.

    The paper's code scores in this way: a task with diverse samples has a short mean, and loses to tight ones.
    """
    best = []
    for matches in index.search(vectors, index.num_live, index.allowed()):
        scores = {match.record.ref.name: match.score * lengths[match.record.ref.name] for match in matches}
        best.append(sorted(scores, key=lambda name: -scores[name])[:DEPTH])
    return best


@dataclass(frozen=True, slots=True)
class Place:
    """The rank of a query's own adapter, 0 if not found; without it, how many of the best 1 and 3 share its cluster."""

    own: int
    cluster_of_1: int
    cluster_of_3: int


def place_of(task: Task, names: Sequence[str], cluster_of: Mapping[str, str]) -> Place:
    others = [cluster_of[name] == task.cluster for name in names if name != task.name]
    own = names.index(task.name) + 1 if task.name in names else 0
    return Place(own, sum(others[:1]), sum(others[:3]))


def hit_share(places: np.ndarray, depth: int) -> float:
    """Return the share of queries whose own adapter is among the first `depth`; `places` as in `Place.own`."""
    return float(((places > 0) & (places <= depth)).mean())


def rank_rows(encoder: Encoder, name: str, tasks: Sequence[Task], parts: Sequence[str]) -> pa.Table:
    """Return a row for each score and query of `parts` (`test`, `choice`): its `Place`."""
    cluster_of = {task.name: task.cluster for task in tasks}
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    samples = {task.name: task.samples for task in tasks}
    index = index_of(encoder, samples)
    lengths = {name: float(np.linalg.norm(encoder.encode(own).mean(axis=0))) for name, own in samples.items()}
    for score, task, part in product(SCORES, tasks, parts):
        vectors = encoder.encode(getattr(task, part))
        found = nearest(index, vectors) if score == COSINE else nearest_by_product(index, vectors, lengths)
        places = [place_of(task, names, cluster_of) for names in found]
        for column, word in {"encoder": name, "score": score, "part": part, "task": task.name}.items():
            columns[column] += [word] * len(places)
        columns["query"] += range(len(places))
        for field in fields(Place):
            columns[field.name] += [getattr(place, field.name) for place in places]
    words, numbers = pa.dictionary(pa.int16(), pa.string()), pa.int16()
    types = {column: words if isinstance(rows[0], str) else numbers for column, rows in columns.items()}
    return pa.table({column: pa.array(rows, types[column]) for column, rows in columns.items()})
