"""The tables of retrieval, as Markdown, from the committed rows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.paper.common.intervals import Interval
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.retrieval.ranking import DEPTHS, SCORES
from benchmarks.paper.retrieval.rankings import Rankings
from benchmarks.paper.retrieval.study import UNTRAINED

_TERCILES = ("near", "middle", "far")


def _or_dash(interval: Interval | None) -> str:
    return "–" if interval is None else interval.in_percent()


def accuracy(rankings: Rankings, score: str) -> str:
    """Return top-k on all, seen and other tasks, and the first adapter's cluster with the own adapter masked."""
    header = ["trained on", "runs", *[f"top-{depth}" for depth in DEPTHS], "unseen top-1", "unseen top-3"]
    header += ["seen top-1", "seen top-3", "masked: same cluster first", "among 3"]
    rows = []
    for label, names in rankings.groups().items():
        tops = [_or_dash(rankings.top(names, score, depth)) for depth in DEPTHS]
        parts = [_or_dash(rankings.top(names, score, d, among)) for among in ("unseen", "seen") for d in (1, 3)]
        masked = [rankings.values(names, score, f"cluster_of_{depth}").mean() / depth for depth in (1, 3)]
        rows.append([label, str(len(names)), *tops, *parts, *map(percent, masked)])
    return table(header, rows)


def gains(rankings: Rankings) -> str:
    """Return the points over the untrained encoder on tasks that were not trained on."""
    header = ["trained on", "runs", "top-1, cosine", "top-3, cosine", "top-1, inner product", "top-3, inner product"]
    kinds = [(score, depth) for score in SCORES for depth in (1, 3)]
    rows = [
        [label, str(len(names)), *[_or_dash(rankings.gain(names, *kind)) for kind in kinds]]
        for label, names in rankings.groups().items()
        if names != [UNTRAINED] and rankings.gain(names, *kinds[0]) is not None
    ]
    return table(header, rows)


def draws(rankings: Rankings) -> str:
    """Return a row for each encoder that left tasks unseen: its training tasks, and the gain on unseen tasks."""
    header = [
        "encoder",
        "tasks",
        "clusters",
        "unseen tasks in them",
        "nearest seen task",
        "untrained",
        "trained",
        "gain",
    ]
    rows = []
    every = rankings.draws
    for name, unseen in rankings.unseen_gains().groupby("draw"):
        own = every[(every["draw"] == name) & every["seen"]]
        clusters = f"{own['cluster'].nunique()} of {every['cluster'].nunique()}"
        share = percent(unseen["cluster_seen"].mean())
        measured = [percent(unseen[column].mean()) for column in ("untrained", "trained", "gain")]
        rows.append([str(name), str(len(own)), clusters, share, f"{unseen['nearest_seen'].mean():.2f}", *measured])
    return table(header, rows)


def boundary(rankings: Rankings) -> str:
    """Return the unseen tasks of all draws together, by whether their cluster was seen and by the nearest seen task."""
    unseen = rankings.unseen_gains()
    parts = {
        "cluster seen": unseen[unseen["cluster_seen"]],
        "cluster not seen": unseen[~unseen["cluster_seen"]],
    }
    thirds = pd.qcut(-unseen["nearest_seen"], 3, labels=_TERCILES)
    for third in _TERCILES:
        own = unseen[thirds == third]
        bounds = f"{own['nearest_seen'].min():.2f} to {own['nearest_seen'].max():.2f}"
        parts[f"nearest seen task {third}: {bounds}"] = own
    rows = [
        [label, str(len(own)), *[percent(own[column].mean()) for column in ("untrained", "trained", "gain")]]
        for label, own in parts.items()
        if len(own)
    ]
    return table(["unseen tasks", "task × draw", "untrained", "trained", "gain"], rows)


def correlations(rankings: Rankings) -> dict[str, float]:
    """Return Spearman's correlations of the gain on unseen tasks with properties of the draw."""
    unseen = rankings.unseen_gains()
    by_draw = unseen.groupby("draw")[["cluster_seen", "nearest_seen", "gain"]].mean()
    return {
        "gain and nearness, task by task": _spearman(unseen["nearest_seen"], unseen["gain"]),
        "gain and share of unseen tasks in seen clusters, draw by draw": _spearman(
            by_draw["cluster_seen"], by_draw["gain"]
        ),
        "gain and mean nearness, draw by draw": _spearman(by_draw["nearest_seen"], by_draw["gain"]),
    }


def _spearman(one: pd.Series, other: pd.Series) -> float:
    return float(np.corrcoef(one.rank(), other.rank())[0, 1])
