"""The rankings as arrays, and their shares with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.retrieval.ranking import COSINE
from benchmarks.paper.retrieval.study import SHARES, UNTRAINED


class Rankings:
    """Every encoder's ranks of the test queries. Dims: E encoders, T tasks, Q queries."""

    def __init__(self, folder: Path) -> None:
        ranks = pd.read_parquet(folder / "retrieval_ranks.parquet").astype({"encoder": str, "score": str, "task": str})
        self.draws = pd.read_parquet(folder / "retrieval_draws.parquet")
        self.tasks = sorted(ranks["task"].unique())
        rows = ranks[ranks["part"] == "test"].sort_values(["task", "query"])
        self._rows = {key: own for key, own in rows.groupby(["encoder", "score"])}
        self._there = {name for name, _ in self._rows}

    def groups(self) -> dict[str, list[str]]:
        """Return the measured encoders of each row of the tables."""
        once = self.draws.drop_duplicates("draw")
        by_label = {"untrained": [UNTRAINED]}
        for share in SHARES:
            wanted = once[(once["share"] == share) & ~once["whole_clusters"]]["draw"]
            by_label[f"{share:.0%}".replace("%", " %")] = sorted(wanted)
        by_label["40 %, whole clusters"] = sorted(once[once["whole_clusters"]]["draw"])
        measured = {label: [name for name in names if name in self._there] for label, names in by_label.items()}
        return {label: names for label, names in measured.items() if names}

    def missing(self) -> list[str]:
        """Return the draws without a trained encoder."""
        return sorted(set(self.draws["draw"]) - self._there)

    def values(self, encoders: Sequence[str], score: str, field: str = "own") -> np.ndarray:
        """Return the column (E, T, Q)."""
        return np.stack([np.reshape(self._rows[name, score][field], (len(self.tasks), -1)) for name in encoders])

    def hits(self, encoders: Sequence[str], score: str, depth: int) -> np.ndarray:
        """Return (E, T, Q): 1 if the own adapter is among the first `depth`."""
        places = self.values(encoders, score)
        return ((places > 0) & (places <= depth)).astype(float)

    def seen(self, encoders: Sequence[str]) -> np.ndarray:
        """Return (E, T): whether each encoder was trained on the task."""
        none = dict.fromkeys(self.tasks, False)
        known = [none | self._seen(name) for name in encoders]
        return np.array([[own[task] for task in self.tasks] for own in known])

    def _seen(self, name: str) -> dict[str, bool]:
        own = self.draws[self.draws["draw"] == name]
        return dict(zip(own["task"], own["seen"], strict=True))

    def top(self, encoders: Sequence[str], score: str, depth: int, among: str = "all") -> Interval | None:
        """Return the share of hits among `all`, `seen` or `unseen` tasks; None if there are none."""
        return _interval(self.hits(encoders, score, depth), self._among(encoders, among))

    def gain(self, encoders: Sequence[str], score: str, depth: int, among: str = "unseen") -> Interval | None:
        """Return the difference to the untrained encoder's share of hits, on the same queries."""
        more = self.hits(encoders, score, depth) - self.hits([UNTRAINED], score, depth)
        return _interval(more, self._among(encoders, among), resamples_tasks=True)

    def _among(self, encoders: Sequence[str], among: str) -> np.ndarray:
        seen = self.seen(encoders)
        return {"all": np.ones_like(seen), "seen": seen, "unseen": ~seen}[among]

    def unseen_gains(self) -> pd.DataFrame:
        """Return the draws' rows of unseen tasks, with `untrained`, `trained` and `gain` of top-1 by cosine."""
        before = dict(zip(self.tasks, self.hits([UNTRAINED], COSINE, 1)[0].mean(axis=1), strict=True))
        rows = self.draws[~self.draws["seen"] & self.draws["draw"].isin(self._there)].copy()
        after = {
            (name, task): share
            for name in rows["draw"].unique()
            for task, share in zip(self.tasks, self.hits([name], COSINE, 1)[0].mean(axis=1), strict=True)
        }
        rows["untrained"] = [before[task] for task in rows["task"]]
        rows["trained"] = [after[pair] for pair in zip(rows["draw"], rows["task"], strict=True)]
        rows["gain"] = rows["trained"] - rows["untrained"]
        return rows


def _interval(values: np.ndarray, counts: np.ndarray, *, resamples_tasks: bool = False) -> Interval | None:
    return bootstrap(values, counts, resamples_tasks=resamples_tasks) if counts.any(axis=1).all() else None
