"""Judge the paper's claims, and what goes beyond them, by the rows of the stages.

A claim is a difference between two methods on the same questions. Its interval resamples questions and tasks, so a
verdict is about other tasks of this kind. The verdict follows from the interval alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from benchmarks.paper.common.expert_draws import hub_tasks, one_a_cluster
from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.retrieval.projected import KIND, Projections, unseen_gains
from benchmarks.paper.retrieval.rankings import Rankings
from benchmarks.paper.retrieval.study import main_draws
from benchmarks.paper.stages.answer_tables import BASELINES, ROWS, Answers

TIE = 0.03  # two methods that differ by less are equal
CLEAR = 0.005  # other seeds of the resampling move a bound by up to 0.3 points
Expected = Literal["above", "equal", "at least"]


class Results:
    """The rows of every stage in `folder`, read when a claim needs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answers: dict[tuple[str, ...], Answers] = {}

    def has(self, names: Sequence[str]) -> bool:
        return all((self._folder / name).exists() for name in names)

    def table(self, name: str) -> pd.DataFrame:
        """Return the rows of one file."""
        return pd.read_parquet(self._folder / name)

    def answers(self, *names: str) -> Answers:
        """Return the scores in these files together."""
        if names not in self._answers:
            rows = pd.concat([pd.read_parquet(self._folder / name) for name in names])
            self._answers[names] = Answers(rows, {})
        return self._answers[names]

    @property
    def main(self) -> Answers:
        return self.answers(ROWS, BASELINES)

    @cached_property
    def rankings(self) -> Rankings:
        return Rankings(self._folder)

    @cached_property
    def projections(self) -> Projections:
        return Projections(pd.read_parquet(self._folder / f"retrieval_{KIND}.parquet"), "test")

    @cached_property
    def unseen_gains(self) -> dict[tuple[str, str], Interval]:
        """The points of top-1 on tasks that trained encoders have not seen, by both projections."""
        seen = {draw.name: set(draw.tasks) for draw in main_draws(read_pool())}
        return unseen_gains(pd.read_parquet(self._folder / f"retrieval_{KIND}.parquet"), seen)

    @cached_property
    def experts(self) -> list[str]:
        """The tasks whose adapters the trained mixtures of experts have."""
        listed = read_task_list().by_name
        return one_a_cluster([listed[name] for name in read_pool()])

    @cached_property
    def hub(self) -> list[str]:
        """The tasks whose adapters LoRAHub sums."""
        listed = read_task_list().by_name
        return hub_tasks([listed[name] for name in read_pool()])

    def of_tasks(self, one: str, others: Sequence[str], files: Sequence[str] = (), *, with_expert: bool) -> Interval:
        """Return `one` minus the best of `others`, on the tasks with or without an expert of their own.

        The best on the questions compared, which favours the others. `files`: in place of the main table's.
        """
        answers = self.answers(*files) if files else self.main
        names = [name for name in answers.scores(one).index if (name in self.experts) == with_expert]
        scores = {run: answers.scores(run).loc[names].to_numpy() for run in (one, *others)}
        best = max(others, key=lambda run: float(scores[run].mean()))
        return bootstrap((scores[one] - scores[best])[np.newaxis], resamples_tasks=True)


@dataclass(frozen=True, slots=True)
class Pair:
    """The difference of two runs in these files. Call it with the results."""

    files: tuple[str, ...]
    one: str
    other: str

    def __call__(self, results: Results) -> Interval:
        return results.answers(*self.files).difference(self.one, self.other)

    def scores(self, results: Results) -> str:
        """Return the scores of both, in percent."""
        answers = results.answers(*self.files)
        return " and ".join(percent(float(answers.scores(run).to_numpy().mean())) for run in (self.one, self.other))


@dataclass(frozen=True, slots=True)
class Claim:
    """A difference, and what it should be. `rows`: the files that it is computed from.

    `paper`: the paper's numbers, of the 7B and the 13B model. `stage`: the command's stage. `difference`: in shares.
    `why`: a text, or one that depends on the rows.
    """

    text: str
    paper: str
    stage: str
    rows: tuple[str, ...]
    expected: Expected
    difference: Callable[[Results], Interval]
    why: str | Callable[[Results], str]


def verdict(expected: Expected, found: Interval) -> str:
    """Return `holds` or `fails` if the whole interval says so by `CLEAR`, else `open`."""
    _, low, high = found
    if expected == "equal":
        is_within = low > -TIE + CLEAR and high < TIE - CLEAR
        return "holds" if is_within else "fails" if high < -TIE - CLEAR or low > TIE + CLEAR else "open"
    least = 0.0 if expected == "above" else -TIE
    return "holds" if low > least + CLEAR else "fails" if high < least - CLEAR else "open"


def claims_table(claims: Sequence[Claim], results: Results) -> str:
    """Return a row per claim, judged by its interval."""
    rows = []
    for claim in claims:
        if results.has(claim.rows):
            found = claim.difference(results)
            why = claim.why if isinstance(claim.why, str) else claim.why(results)
            scores = f"{claim.difference.scores(results)}: " if isinstance(claim.difference, Pair) else ""
            judged = [scores + found.in_percent(), f"**{verdict(claim.expected, found)}**", why]
        else:
            judged = ["not measured yet", "–", "–"]
        rows.append([claim.text, claim.paper, *judged, f"`{_command(claim, results)}`"])
    return table(["claim", "paper", "here: scores, difference", "verdict", "why", "stage"], rows)


def _command(claim: Claim, results: Results) -> str:
    """Return the stage with the number of questions that its rows have."""
    if not results.has(claim.rows):
        return claim.stage
    numbers = results.table(claim.rows[0]).get("number")
    return claim.stage if numbers is None else f"{claim.stage} --per-task {numbers.nunique()}"


def judged_claims(claims: Sequence[Claim], results: Results) -> list[dict[str, object]]:
    """Return each measured claim with its difference in points, interval and verdict."""
    found = []
    for claim in (claim for claim in claims if results.has(claim.rows)):
        interval = claim.difference(results)
        mean, low, high = (round(100 * value, 2) for value in interval)
        judged = {"claim": claim.text, "verdict": verdict(claim.expected, interval)}
        found.append(judged | {"points": mean, "low": low, "high": high, "stage": _command(claim, results)})
    return found
