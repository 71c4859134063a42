"""Separate the company from the weights in a mixture: `python -m benchmarks.paper.stages.companions`.

Each question's own adapter is mixed with two companions of four kinds, at four ratios of its weight to each of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, Method, run_all
from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.markdown import table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.main_table import load_bench
from benchmarks.training.bigbench_tasks import task_rng
from lora_store import LOCAL_TENANT, Plan
from retriever_svc import Retriever
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "companions.parquet"
NEAREST = "nearest"  # those that retrieval finds for the question; the other kinds are the same for all of a task
KINDS = (NEAREST, "random", "same_labels", "farthest")
RATIOS = (1, 2, 3, 4)  # the own adapter's weight to that of each companion
_NUM_COMPANIONS = 2
_PER_TASK = 40  # 46 tasks show 3 points with a power of 80 %


@dataclass(frozen=True, slots=True)
class Accompanied:
    """The own adapter with two companions, weights adding up to 1. `companions`: by task; None: the nearest."""

    ratio: int
    companions: Mapping[str, Sequence[str]] | None

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        masked = Routed("mixture", _NUM_COMPANIONS, masks_own=True)
        nearest = masked.plans(retriever, questions) if self.companions is None else [None] * len(questions)
        return [self._plan(retriever, question, plan) for question, plan in zip(questions, nearest, strict=True)]

    def _plan(self, retriever: Retriever, question: Question, nearest: Plan | None) -> Plan:
        if nearest is None:
            assert self.companions is not None
            names = list(self.companions[question.task])
        else:
            names = [adapter.ref.name for adapter in nearest.adapters]
        share = 1 / (self.ratio + len(names))
        choices = [(question.task, self.ratio * share), *[(name, share) for name in names]]
        return retriever.plan_named(LOCAL_TENANT, choices, "mixture")


@dataclass(frozen=True, slots=True)
class Alone:
    """The own adapter alone, with this weight."""

    weight: float

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return [retriever.plan_named(LOCAL_TENANT, [(q.task, self.weight)], "mixture") for q in questions]


def companions_of(study: Study, retriever: Retriever) -> dict[str, dict[str, list[str]]]:
    """Return the companions of each task, by kind. Ties are broken by a seed from the task's name."""
    vectors = {}
    for name in study.specs:
        embedding = retriever.resolve(LOCAL_TENANT, name).embedding
        assert embedding is not None, name
        vectors[name] = embedding.vector
    answers = {name: {item.answers[0].lower() for item in study.parts[name].train} for name in study.specs}
    found: dict[str, dict[str, list[str]]] = {kind: {} for kind in KINDS if kind != NEAREST}
    for task in study.specs:
        others = [name for name in study.specs if name != task]
        task_rng(f"companions of {task}").shuffle(others)
        found["random"][task] = others[:_NUM_COMPANIONS]
        near = sorted(others, key=lambda name: float(vectors[name] @ vectors[task]))
        found["farthest"][task] = near[:_NUM_COMPANIONS]
        shared = sorted(others, key=lambda name: -overlap(answers[name], answers[task]))
        found["same_labels"][task] = shared[:_NUM_COMPANIONS]
    return found


def overlap(one: set[str], other: set[str]) -> float:
    """Return the share of common answers, |A ∩ B| / |A ∪ B|."""
    return len(one & other) / len(one | other)


def sharing_tasks(study: Study, companions: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks that share at least half of their answers with both companions."""
    answers = {name: {item.answers[0].lower() for item in study.parts[name].train} for name in study.specs}
    return [
        task
        for task, names in companions.items()
        if all(overlap(answers[task], answers[name]) >= 0.5 for name in names)
    ]


def methods_of(
    companions: Mapping[str, Mapping[str, Sequence[str]]], ratios: Sequence[int] = RATIOS
) -> dict[str, Method]:
    """Return every kind at every ratio, and the own adapter alone whole and at a third."""
    found: dict[str, Method] = {"own": Alone(1.0), "own_third": Alone(1 / 3)}
    return found | {f"{kind}_{ratio}": Accompanied(ratio, companions.get(kind)) for kind in KINDS for ratio in ratios}


def section(rows: pd.DataFrame, sharing: Sequence[str]) -> str:
    """Return the appendix. `sharing`: the tasks whose companions of the same labels share them."""
    answers = Answers(rows, {})
    ratios = [ratio for ratio in RATIOS if f"{NEAREST}_{ratio}" in answers.runs]
    lines = [
        [kind.replace("_", " "), *[answers.interval(f"{kind}_{ratio}").in_percent() for ratio in ratios]]
        for kind in KINDS
    ]
    alone = [[run.replace("_", " "), answers.interval(run).in_percent()] for run in ("own", "own_third")]
    pairs = [("own_third", "own"), ("random_1", f"{NEAREST}_1"), ("farthest_1", f"{NEAREST}_1")]
    pairs += [(f"{NEAREST}_{ratio}", "own") for ratio in RATIOS]
    parts = [
        "## Companions and weights\n",
        f"{answers.scores('own').shape[0]} tasks, {answers.scores('own').shape[1]} questions each; percent with 95 %",
        "intervals. Columns: the own adapter's weight to that of each of two companions; weights add up to 1.\n",
        table(["companions", *[f"{ratio} : 1" for ratio in ratios]], lines),
        "The own adapter alone:\n",
        table(["", "percent"], alone),
        differences(answers, pairs),
    ]
    if sharing:
        few = Answers(rows[rows["task"].isin(sharing)], {})
        parts += [f"The {len(sharing)} tasks with at least two companions of the same labels:\n"]
        parts += [differences(few, [("same_labels_1", "own"), ("same_labels_1", f"{NEAREST}_1")])]
    return "\n".join(parts)


def sentence(folder: Path) -> str:
    """Return the experiment's result in one sentence."""
    if not (folder / ROWS).exists():
        return "It was not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    runs = ("own_third", f"{NEAREST}_1", "random_1", "farthest_1")
    third, near, random, far = (answers.difference(run, "own").in_percent() for run in runs)
    more = answers.difference("farthest_1", f"{NEAREST}_1").in_percent()
    return (
        f"Against the own adapter, a third of it alone differs by {third} points, equal mixing with the nearest"
        f" companions by {near}, with random ones by {random}, and with the farthest by {far}. The farthest are {more}"
        " points better than the nearest."
    )


def measure(bench: Bench, folder: Path, per_task: int, ratios: Sequence[int] = RATIOS) -> None:
    """Answer under every kind and ratio, write rows and the appendix. Known answers are not computed again."""
    companions = companions_of(bench.study, bench.retriever)
    rows = run_all(bench, methods_of(companions, ratios), per_task, bench.study.workspace.rows / "companions")
    write_parquet(folder / ROWS, rows)
    text = section(rows.to_pandas(), sharing_tasks(bench.study, companions["same_labels"]))
    (folder / "companions.md").write_text(text, encoding="utf-8")


def main(
    per_task: PerTask = _PER_TASK,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
    ratio: Annotated[list[int] | None, typer.Option(help="this ratio only; may be given again")] = None,
) -> None:
    """Run the experiment over the pool."""
    bench = load_bench(Workspace(root), encoder, Console(width=120)).bench
    measure(bench, PAPER_RESULTS, per_task, ratio or RATIOS)


if __name__ == "__main__":
    typer.run(main)
