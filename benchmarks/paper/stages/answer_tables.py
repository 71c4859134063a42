"""Tables and headline numbers of answer quality, from the raw rows of the runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.paper.common.expert_draws import hub_tasks, one_a_cluster
from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.pool.choose import read_pool
from benchmarks.results_file import write_part

ROWS, BASELINES = "answers.parquet", "baselines.parquet"
ROUTED = ("moe_top1", "moe_top3", "moe_soft", "smear")
_HUBS = ("lorahub", "lorahub_uniform_start")
_OTHERS = (*ROUTED, "adaptersoup", *_HUBS)
_FEW = "clusters of one task"
COMPARED = [
    ("perfect", "base"),
    ("perfect", "majority"),
    ("mixture_iid", "selection_iid"),
    ("mixture_iid", "fusion_iid"),
    ("mixture_ood", "selection_ood"),
    ("mixture_ood", "fusion_ood"),
    *[(f"{way}_{pool}", name) for pool in ("iid", "ood") for way in ("selection", "mixture") for name in _OTHERS],
]


class Answers:
    """The scores of every run, by task. `clusters`: task -> its cluster."""

    def __init__(self, rows: pd.DataFrame, clusters: Mapping[str, str]) -> None:
        self._clusters = _without_single_ones(clusters, set(rows["task"]))
        self._scores = {
            str(run): own.pivot(index="task", columns="number", values="score") for run, own in rows.groupby("run")
        }
        self.runs = list(dict.fromkeys(rows["run"]))

    @property
    def clusters(self) -> list[str]:
        present = set(self._scores[self.runs[0]].index)
        return list(dict.fromkeys(cluster for task, cluster in self._clusters.items() if task in present))

    def scores(self, run: str, cluster: str | None = None) -> pd.DataFrame:
        """Return (tasks, questions), shares of 1."""
        scores = self._scores[run]
        return scores if cluster is None else scores[[self._clusters[task] == cluster for task in scores.index]]

    def interval(self, run: str, cluster: str | None = None) -> Interval:
        """Return the interval of a run. Every task has equal weight."""
        return bootstrap(self.scores(run, cluster).to_numpy()[np.newaxis])

    def difference(self, one: str, other: str) -> Interval:
        """Return the interval of the difference of two runs on the same questions. Resample questions and tasks."""
        return self.difference_on(one, other, lambda _: True)

    def difference_on(self, one: str, other: str, is_task: Callable[[str], bool]) -> Interval:
        """Return the same interval over some of the tasks."""
        own = [task for task in self.scores(one).index if is_task(task)]
        more = (self.scores(one) - self.scores(other)).loc[own]
        return bootstrap(more.to_numpy()[np.newaxis], resamples_tasks=True)

    def difference_here(self, one: str, other: str) -> Interval:
        """Return the interval for these tasks alone: resample the questions of each."""
        return bootstrap((self.scores(one) - self.scores(other)).to_numpy()[np.newaxis])

    def of_task(self, task: str, one: str, other: str) -> Interval:
        """Return the interval of the difference on one task's questions."""
        return bootstrap((self.scores(one) - self.scores(other)).loc[[task]].to_numpy()[np.newaxis])


def _without_single_ones(clusters: Mapping[str, str], tasks: Collection[str]) -> dict[str, str]:
    """Return the tasks' clusters. Tasks that are alone in theirs are put together: one task is not a cluster."""
    own = {task: cluster for task, cluster in clusters.items() if task in tasks}
    sizes = Counter(own.values())
    single = [task for task, cluster in own.items() if sizes[cluster] == 1]
    return own | (dict.fromkeys(single, _FEW) if len(single) > 1 else {})


def main_table(answers: Answers) -> str:
    """Return a table with a column per run. A cluster's cell is its mean; the last rows have the overall interval."""
    rows = [
        [f"{cluster} ({len(answers.scores(answers.runs[0], cluster))})"]
        + [percent(answers.interval(run, cluster).mean) for run in answers.runs]
        for cluster in answers.clusters
    ]
    whole = [answers.interval(run) for run in answers.runs]
    rows.append(["**all tasks**", *[f"**{percent(found.mean)}**" for found in whole]])
    rows.append(["95 % interval", *[f"{percent(found.low)} to {percent(found.high)}" for found in whole]])
    return table(["cluster (tasks)", *[run.replace("_", " ") for run in answers.runs]], rows)


def cluster_intervals(answers: Answers) -> str:
    """Return every cluster's interval in every run."""
    rows = [
        [cluster, *[answers.interval(run, cluster).in_percent() for run in answers.runs]]
        for cluster in answers.clusters
    ]
    return table(["cluster", *[run.replace("_", " ") for run in answers.runs]], rows)


def differences(answers: Answers, pairs: Sequence[tuple[str, str]] = COMPARED) -> str:
    """Return the points between two runs, paired by question."""
    rows = [
        [
            f"{one} − {other}".replace("_", " "),
            answers.difference(one, other).in_percent(),
            answers.difference_here(one, other).bounds_in_percent(),
            _ahead(answers, one, other),
        ]
        for one, other in pairs
        if {one, other} <= set(answers.runs)
    ]
    header = ["difference", "points (95 % interval)", "for these tasks alone", "tasks with more / less"]
    return table(header, rows)


def _ahead(answers: Answers, one: str, other: str) -> str:
    means = (answers.scores(one) - answers.scores(other)).mean(axis=1)
    return f"{(means > 0).sum()} / {(means < 0).sum()}"


def own_adapters(answers: Answers) -> str:
    """Compare each task's own adapter with the base model and with guessing."""
    rows = [
        [task, *[percent(answers.scores(run).loc[task].mean()) for run in ("perfect", "base", "majority")]]
        + [answers.of_task(task, "perfect", run).in_percent() for run in ("base", "majority")]
        for task in answers.scores("perfect").index
    ]
    return table(["task", "own adapter", "base", "guessing", "own − base", "own − guessing"], rows)


def by_coverage(rows: pd.DataFrame, held: Mapping[str, Collection[str]], pool: str, *, has_own: bool) -> str:
    """Compare selection and mixture with each baseline, on the tasks whose adapter it has or on the others.

    `held`: run -> tasks whose adapters it has. `pool`: whether the retrieved methods have all (`iid`).
    """
    lines = []
    for run in (run for run in held if run in set(rows["run"])):
        answers = Answers(rows[rows["task"].isin(held[run]) == has_own], {})
        line = [run.replace("_", " "), str(len(answers.scores(run))), answers.interval(run).in_percent()]
        line += [answers.difference(f"{way}_{pool}", run).in_percent() for way in ("selection", "mixture")]
        lines.append(line)
    return table(["run", "tasks", "score", f"selection {pool} −", f"mixture {pool} −"], lines)


def figures(answers: Answers) -> dict[str, float]:
    """Return `score_<method>_iid` or `_ood` with bounds. Methods that mask nothing are in distribution."""
    found: dict[str, float] = {}
    for run in answers.runs:
        name = f"score_{run}" if run.endswith(("_iid", "_ood")) else f"score_{run}_iid"
        interval = answers.interval(run)
        found |= {name: interval.mean, f"{name}_lo": interval.low, f"{name}_hi": interval.high}
    return {name: round(value, 4) for name, value in found.items()}


def write_tables(folder: Path, encoder: str) -> None:
    """Write the report's section and the numbers from the rows in `folder`, with the baselines' if they exist."""
    found = [pd.read_parquet(folder / name) for name in (ROWS, BASELINES) if (folder / name).exists()]
    rows, listed = pd.concat(found), read_task_list().by_name
    answers = Answers(rows, {name: spec.cluster for name, spec in listed.items()})
    pool = [listed[name] for name in read_pool()]
    held = dict.fromkeys(ROUTED, one_a_cluster(pool)) | dict.fromkeys(_HUBS, hub_tasks(pool))
    num_rows = answers.scores(answers.runs[0]).shape
    parts = [
        "## Answers\n",
        f"{num_rows[0]} tasks, {num_rows[1]} test questions each, greedy, encoder: {encoder}. In percent: exact",
        "match, ROUGE-L for free text. `iid`: every adapter can be chosen, `ood`: the question's own is masked.\n",
        "MoE and SMEAR: a router over the adapters of one task per cluster, which reads the encoder's vector of the",
        "prompt once (the paper's reads every layer's input), 120 steps of 8 on the samples of all tasks. LoRAHub: one",
        "set of weights for 20 adapters, from zeros, 40 attempts of COBYLA on all samples. `lorahub uniform start`: an",
        "earlier search, from equal weights, 20 attempts of a (1+1) evolution strategy on 192 samples.",
        "AdapterSoup: the three nearest to the mean of the questions' vectors.\n",
        main_table(answers),
        "Intervals of differences resample the questions of each task and the tasks; those of scores, and those for",
        "`these tasks alone`, the questions only. Tasks that are alone in their cluster are in one row.\n",
        differences(answers),
        "### Tasks whose adapter the baseline has, in distribution\n",
        by_coverage(rows, held, "iid", has_own=True),
        "### Tasks whose adapter the baseline does not have, in distribution for the retrieved methods\n",
        by_coverage(rows, held, "iid", has_own=False),
        "### Tasks whose adapter the baseline does not have, out of distribution\n",
        by_coverage(rows, held, "ood", has_own=False),
        "### Intervals by cluster\n",
        cluster_intervals(answers),
        "### Own adapters, task by task\n",
        own_adapters(answers),
    ]
    section = "\n".join(parts)
    (folder / "answers.md").write_text(section, encoding="utf-8")
    write_part("paper", "answers", figures=figures(answers), table=section, runs=[])
