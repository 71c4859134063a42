"""Measure `loraretriever pool evaluate`: `python -m benchmarks.paper.stages.competence`.

Two pools of the study's adapters: one with a copy of some adapters that was trained on exchanged answers, and one with
an adapter without samples for each of these tasks, whose original is withdrawn after the measurement.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.answers import Asker, Question
from benchmarks.paper.answering.auto import Auto
from benchmarks.paper.answering.methods import Perfect
from benchmarks.paper.answering.runs import Method, pool_retriever, run_all
from benchmarks.paper.answering.stores import ACTOR, open_store, packaged_encoder, publish, retriever_over
from benchmarks.paper.answering.study import Study, publish_lacking
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import NUM_TEST, Parts, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.pool.train_pool import in_turns, recipe_of, train_all, train_on
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.conflicts import FLIPPED, HALVES, Together, copies_of
from benchmarks.paper.stages.flan_pool import chosen_tasks as tasks_of_one_label_set
from benchmarks.paper.stages.main_table import Loaded, load_loaded
from benchmarks.results_file import write_part
from benchmarks.training.bigbench_tasks import Item, TaskSpec
from deployments.publishing.evaluation import max_tokens_for, score_of
from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import model_source
from lora_store import LOCAL_TENANT, AdapterRecord, LoraStore, Plan, PlannedAdapter, Ranking, Sample
from lora_store.sample_files import SAMPLES_FILE
from retriever_svc import Encoder, Region, Retriever, Scorer
from retriever_svc.competence import FIRST_ROUND, evaluate

ROWS, TWINS = "competence.parquet", "competence_twins.parquet"
NUM_TASKS, NUM_TWINS = 12, 4  # nine tasks of the pool have a closed set of answers; more join it
SHARES = (0.25, 0.5)  # of the weight, for a copy in a mixture with its original
TWIN = ".twin"


class EngineScorer(Scorer):
    """Scores adapters as the server's `AnswerScorer` does, with the study's engine. Known answers are not computed."""

    def __init__(self, asker: Asker, out: Console) -> None:
        self._asker, self._out = asker, out

    def prepare(self, regions: Sequence[Region]) -> None:
        """Compute the first round of all regions together, in full batches."""
        first = [(record, e) for r in regions for record in r.candidates for e in r.examples[:FIRST_ROUND]]
        self._asker.answers([self._asked(*pair) for pair in first], self._out, "first round")

    async def scores(self, adapter: AdapterRecord, examples: Sequence[Sample]) -> Sequence[float]:
        """Return one score for each example."""
        texts = self._asker.answers([self._asked(adapter, example) for example in examples], _QUIET, "")
        return [score_of(text, example.output or "") for text, example in zip(texts, examples, strict=True)]

    def _asked(self, adapter: AdapterRecord, example: Sample) -> tuple[Question, Plan]:
        output = example.output or ""
        plan = Plan("selection", (PlannedAdapter(adapter.ref, adapter.weights_digest, 1.0),))
        item = Item(example.input, (output,))
        return Question(adapter.ref.name, "samples", 0, item, max_tokens_for(output)), plan


_QUIET = Console(quiet=True)


def chosen_tasks(specs: Sequence[TaskSpec], number: int) -> list[TaskSpec]:
    """Return tasks with a closed set of answers, from as many clusters as possible."""
    return in_turns([spec for spec in specs if spec.labels])[:number]


def further_tasks(pool: Sequence[str], number: int) -> list[TaskSpec]:
    """Return tasks that join the pool so that `number` of its tasks have a closed set of answers."""
    listed = read_task_list().by_name
    closed = len(chosen_tasks([listed[name] for name in pool], len(pool)))
    others = [spec for spec in tasks_of_one_label_set(list(listed.values())) if spec.name not in pool]
    return others[: max(0, number - closed)]


@dataclass(frozen=True, slots=True)
class Measured:
    """A pool after an evaluation."""

    retriever: Retriever
    store: LoraStore
    rankings: list[Ranking]


class Competence:
    """The study's pool with further adapters of `tasks`, which must have been trained."""

    def __init__(self, loaded: Loaded, tasks: Sequence[TaskSpec], copies: dict[str, Parts], encoder: Encoder) -> None:
        """Set up the pools. `copies`: the further adapters by name: a flipped copy for each task, halves for some."""
        self._bench, self._tasks, self._encoder = loaded.bench, {spec.name: spec for spec in tasks}, encoder
        self._copies = copies
        publish_lacking(loaded.store, self.workspace, list(copies), loaded.bench.asker.engine.bank)

    @property
    def workspace(self) -> Workspace:
        return self._bench.study.workspace

    def rows(self, per_task: int) -> pa.Table:
        """Answer the questions of the tasks with flipped copies: without copies, with them, and measured."""
        folder = self.workspace.rows / "competence"
        asked = replace(self._bench.study, specs=self._tasks)
        plain = replace(self._bench, study=asked, retriever=self._over("competence-plain", []))
        flipped = replace(plain, retriever=self._over("competence-flipped", self._named(FLIPPED)))
        measured = replace(plain, retriever=self.measured("competence-measured", self._named(FLIPPED)).retriever)
        found = [run_all(flipped, _own_methods(), per_task, folder)]
        for pool, bench in (("plain", plain), ("flipped", flipped), ("measured", measured)):
            found.append(run_all(bench, _methods(pool), per_task, folder))
        return pa.concat_tables(found)

    def twin_rows(self, per_task: int) -> pa.Table:
        """Return a row per question: the adapter chosen once the original is withdrawn. Its twin has no samples."""
        tasks = [task for task in self._tasks if f"{task}{HALVES[0]}" in self._copies]
        names = [f"{task}{TWIN}" for task in tasks]
        for task, name in zip(tasks, names, strict=True):
            self._strip(f"{task}{HALVES[0]}", name)
        pool = self.measured("competence-twins", [], names)
        pool.store.withdraw(LOCAL_TENANT, tasks, actor=ACTOR)
        retriever = retriever_over(pool.store, self._encoder)
        questions = [q for q in self._bench.study.questions("test", per_task) if q.task in tasks]
        plans = Auto("selection").plans(retriever, questions)
        rows = [
            {"task": q.task, "number": q.number, "chosen": plan.adapters[0].ref.name if plan.adapters else ""}
            for q, plan in zip(questions, plans, strict=True)
        ]
        return pa.Table.from_pylist(rows)

    def measured(self, name: str, copies: Sequence[str], bare: Sequence[str] = ()) -> Measured:
        """Publish a new pool, evaluate it as `loraretriever pool evaluate` does, and store the rankings."""
        shutil.rmtree(self.workspace.store_uri(f"{name}-{self._encoder.identity}"), ignore_errors=True)
        retriever = self._over(name, copies)
        store = open_store(self.workspace.store_uri(f"{name}-{self._encoder.identity}"))
        if bare:
            folders = [self.workspace.adapters / bare_name for bare_name in bare]
            publish(store, folders, self._encoder, self._bench.asker.engine.bank)
            retriever = retriever_over(store, self._encoder)
        regions = list(retriever.regions(LOCAL_TENANT, lambda record: store.samples(record.samples_digest or "")))
        scorer = EngineScorer(self._bench.asker, self._bench.out)
        scorer.prepare(regions)

        async def measure() -> list[Ranking]:
            return [ranking async for ranking in evaluate(regions, scorer) if ranking is not None]

        rankings = asyncio.run(measure())
        store.rank(LOCAL_TENANT, rankings, ACTOR)
        return Measured(retriever_over(store, self._encoder), store, rankings)

    def _over(self, store: str, copies: Sequence[str]) -> Retriever:
        """Return the Retriever over the study's pool and these copies, which are newer."""
        bench = self._bench
        study = bench.study
        pool_retriever(study, bench.asker, self._encoder, store)
        specs = study.specs | {name: replace(self._tasks[name.rpartition(".")[0]], name=name) for name in copies}
        whole = Study(study.workspace, specs, study.parts | self._copies, study.tokenizer)
        return pool_retriever(whole, bench.asker, self._encoder, store)

    def _named(self, end: str) -> list[str]:
        return [f"{task}{end}" for task in self._tasks]

    def _strip(self, source: str, name: str) -> None:
        """Copy an adapter's folder without its samples."""
        target = self.workspace.adapters / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.workspace.adapters / source, target)
        (target / SAMPLES_FILE).unlink()


def _own_methods() -> dict[str, Method]:
    """Return the own adapter, the copy, and their mixtures."""
    found: dict[str, Method] = {"own": Perfect(), "copy": Together("selection", ((FLIPPED, 1.0),))}
    for share in SHARES:
        found[f"own_flipped_{share:g}"] = Together("mixture", (("", 1 - share), (FLIPPED, share)))
    return found


def _methods(pool: str) -> dict[str, Method]:
    return {f"{pool}_selection": Auto("selection"), f"{pool}_auto": Auto()}


def sentence(folder: Path) -> str:
    """Return how copies with exchanged answers harm selection, and what the evaluation brings back."""
    if not (folder / ROWS).exists():
        return "Copies with exchanged answers were not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    tasks, questions = answers.scores("own").shape
    lost = answers.difference("flipped_selection", "plain_selection").in_percent()
    back = answers.difference("measured_selection", "flipped_selection").in_percent()
    return (
        f"With a contradicting copy of the adapters of {tasks} tasks in the pool ({questions} questions each),"
        f" selection changes by {lost} points. After the server's evaluation, selection changes by a further {back}"
        " points."
    )


def section(rows: pd.DataFrame, twins: pd.DataFrame) -> str:
    """Return the report's section."""
    answers = Answers(rows, {})
    tasks = list(answers.scores("own").index)
    lines = [
        [
            run.replace("_", " "),
            answers.interval(run).in_percent(),
            *[percent(answers.scores(run).loc[task].mean()) for task in tasks],
        ]
        for run in answers.runs
    ]
    ways = ("selection", "auto")
    pairs = [(f"{pool}_{way}", f"plain_{way}") for pool in ("flipped", "measured") for way in ways]
    pairs += [(f"measured_{way}", f"flipped_{way}") for way in ways]
    shares = _twin_shares(twins)
    parts = [
        "## Competence\n",
        f"`flipped`: the pool with a copy of {len(tasks)} adapters, published later, that was trained on exchanged",
        "answers. `measured`: the same pool, evaluated. The packaged encoder, with projection.",
        "`copy`: that copy alone; `own flipped 0.25`: its mixture with the original, a quarter of the weight on it.\n",
        table(["run", "all tasks, percent", *tasks], lines),
        differences(answers, pairs),
        "Adapters of half of the training examples, published without samples, whose originals were withdrawn after",
        "the measurement: the share of their tasks' prompts that they answer.\n",
        table(["task", "percent"], [[task, percent(share)] for task, share in shares.items()]),
    ]
    return "\n".join(parts)


def _twin_shares(twins: pd.DataFrame) -> dict[str, float]:
    chosen = twins["chosen"] == twins["task"] + TWIN
    return {str(task): float(own.mean()) for task, own in chosen.groupby(twins["task"])} | {"all": float(chosen.mean())}


def figures(rows: pd.DataFrame, twins: pd.DataFrame) -> dict[str, float]:
    """Return the headline numbers as shares of 1."""
    answers = Answers(rows, {})
    found: dict[str, float] = {}
    for pool in ("plain", "flipped", "measured"):
        mean, low, high = answers.interval(f"{pool}_selection")
        name = f"competence_selection_{pool}"
        found |= {name: mean, f"{name}_lo": low, f"{name}_hi": high}
    found["competence_twins_chosen"] = _twin_shares(twins)["all"]
    return {name: round(value, 4) for name, value in found.items()}


def write_tables(folder: Path) -> None:
    """Write the section and the numbers from the rows in `folder`."""
    rows, twins = (pd.read_parquet(folder / name) for name in (ROWS, TWINS))
    text = section(rows, twins)
    (folder / "competence.md").write_text(text, encoding="utf-8")
    write_part("paper", "competence", figures=figures(rows, twins), table=text, runs=[])


def main(
    per_task: PerTask = NUM_TEST,
    num_tasks: Annotated[int, typer.Option(help="tasks with a flipped copy")] = NUM_TASKS,
    num_twins: Annotated[int, typer.Option(help="tasks with an adapter without samples")] = NUM_TWINS,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Train the further adapters, evaluate the pools, answer the questions, write rows and the section."""
    workspace, out, encoder = Workspace(root), Console(width=120), packaged_encoder()
    pool = read_pool()
    more = further_tasks(pool, num_tasks)
    with Progress() as progress:
        train_all(more, workspace, Path(model_source(WorkerConfig())), progress)
    names = [*pool, *[spec.name for spec in more]]
    loaded = load_loaded(workspace, encoder, out, "competence-pool", names)
    study = loaded.bench.study
    tasks = chosen_tasks(list(study.specs.values()), num_tasks)
    further = [(spec, FLIPPED) for spec in tasks] + [(spec, HALVES[0]) for spec in tasks[:num_twins]]
    copies = {f"{spec.name}{end}": copies_of(study.parts[spec.name])[end] for spec, end in further}
    recipes = {f"{spec.name}{end}": recipe_of(spec) for spec, end in further}
    with Progress() as progress:
        train_on(copies, recipes, workspace, Path(model_source(loaded.bench.asker.engine.config)), progress)
    competence = Competence(loaded, tasks, copies, encoder)
    write_parquet(PAPER_RESULTS / ROWS, competence.rows(per_task))
    write_parquet(PAPER_RESULTS / TWINS, competence.twin_rows(per_task))
    write_tables(PAPER_RESULTS)


if __name__ == "__main__":
    typer.run(main)
