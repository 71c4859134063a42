"""The scores of a stage's arms, and the two tables that every stage of answers writes from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table

TIE = 0.03
CLEAR = 0.005
"""Two methods that differ by less than `TIE` are equal. Other seeds of the resampling move a bound by up to `CLEAR`."""
Expected = Literal["above", "equal", "at least"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A difference between two arms on the same questions, and what it should be."""

    text: str
    one: str
    other: str
    expected: Expected = "above"


class Answers:
    """The scores of every arm, by task."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._rows = rows
        self._scores = {
            str(run): own.pivot(index="task", columns="number", values="score") for run, own in rows.groupby("run")
        }
        self.runs = list(dict.fromkeys(rows["run"]))

    def scores(self, run: str) -> pd.DataFrame:
        """Return (tasks, questions), shares of 1."""
        return self._scores[run]

    def interval(self, run: str) -> Interval:
        """Return the interval of an arm. Every task has equal weight."""
        return bootstrap(self.scores(run).to_numpy()[np.newaxis])

    def difference(self, one: str, other: str) -> Interval:
        """Return the interval of the difference of two arms on the same questions. Resample questions and tasks."""
        return bootstrap((self.scores(one) - self.scores(other)).to_numpy()[np.newaxis], resamples_tasks=True)

    def share_own_first(self, run: str) -> float | None:
        """Return the share of questions whose own adapter has the largest weight, or None without adapters."""
        own = self._rows[self._rows["run"] == run]
        if not any(len(names) for names in own["adapters"]):
            return None
        first = [
            len(names) > 0 and names[int(np.argmax(weights))] == task
            for names, weights, task in zip(own["adapters"], own["weights"], own["task"], strict=True)
        ]
        return float(np.mean(first))


def verdict(expected: Expected, found: Interval) -> str:
    """Return `holds` or `fails` if the whole interval says so by `CLEAR`, else `open`."""
    _, low, high = found
    if expected == "equal":
        is_within = low > -TIE + CLEAR and high < TIE - CLEAR
        return "holds" if is_within else "fails" if high < -TIE - CLEAR or low > TIE + CLEAR else "open"
    least = 0.0 if expected == "above" else -TIE
    return "holds" if low > least + CLEAR else "fails" if high < least - CLEAR else "open"


def arms_table(answers: Answers) -> str:
    """Return a row for each arm."""
    rows = []
    for run in answers.runs:
        first = answers.share_own_first(run)
        rows.append(
            [run.replace("_", " "), answers.interval(run).in_percent(), "–" if first is None else percent(first)]
        )
    return table(["arm", "percent right (95 % interval)", "own adapter first, %"], rows)


def claims_table(answers: Answers, claims: Sequence[Claim]) -> str:
    """Return a row for each claim whose arms were measured."""
    rows = []
    for claim in (claim for claim in claims if {claim.one, claim.other} <= set(answers.runs)):
        found = answers.difference(claim.one, claim.other)
        arms = f"{claim.one} − {claim.other}".replace("_", " ")
        rows.append([claim.text, arms, found.in_percent(), f"**{verdict(claim.expected, found)}**"])
    return table(["claim", "difference", "points (95 % interval)", "verdict"], rows)


def collect_figures(answers: Answers, prefix: str) -> dict[str, float]:
    """Return `<prefix>_<arm>`, a share of 1, with the bounds of its interval."""
    found: dict[str, float] = {}
    for run in answers.runs:
        mean, low, high = answers.interval(run)
        found |= {f"{prefix}_{run}": mean, f"{prefix}_{run}_lo": low, f"{prefix}_{run}_hi": high}
    return {name: round(value, 4) for name, value in found.items()}
