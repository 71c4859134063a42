"""The one shape of a stage of answers: its data and arms, their scores, its table.

A stage is an object; `run` is its command. Its rows are written to `results/paper/<name>.parquet`, its tables to
`<name>.md`, its numbers to `results.json`. Known answers are never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console

from benchmarks.paper.answering.runs import Bench, Method, pool_retriever, run_all
from benchmarks.paper.answering.stores import packaged_encoder
from benchmarks.paper.answering.study import Weights, load_asker, load_study, worker_config
from benchmarks.paper.common.options import PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import read_pool, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.retrieval.experiments import BEST
from benchmarks.paper.stages.answers import Answers, Claim, arms_table, claims_table, collect_figures
from benchmarks.results_file import change_suffix, write_part
from lora_store import LoraStore
from retriever_svc import Encoder

PACKAGED = "packaged"
"""The packaged encoder with its projection, as in a server."""
TRAINED = "trained"
"""The encoder that the stage `retrieval` trained on 40 % of the tasks."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pool behind the server's engine and Retriever, and the source of the engine's weights."""

    bench: Bench
    store: LoraStore
    weights: Weights
    encoder: Encoder


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage runs with. `tasks`: those of the pool, or fewer for a trial; `folder`: for raw rows."""

    workspace: Workspace
    encoder: Encoder
    tasks: Sequence[str]
    per_task: int
    out: Console

    @property
    def folder(self) -> Path:
        return self.workspace.rows / "answers"

    def load(self, name: str = "", tasks: Sequence[str] = (), **settings: Any) -> Loaded:
        """Load these tasks, or the pool's. `name`: of its store; `settings`: of the engine."""
        listed, names = read_task_list().by_name, list(tasks or self.tasks)
        config = worker_config(len(names), **settings)
        study = load_study([listed[each] for each in names], self.workspace, config)
        asker, store, weights = load_asker(self.workspace, config, names)
        is_whole = names == read_pool()
        retriever = pool_retriever(study, asker, self.encoder, name or ("pool" if is_whole else "trial"))
        return Loaded(Bench(study, asker, retriever, self.out), store, weights, self.encoder)


Rows = Callable[[Context], pa.Table]
"""Answer a stage's questions under all of its arms, and return their rows."""
Arms = Callable[[Loaded], Mapping[str, Method]]


@dataclass(frozen=True, slots=True)
class Stage:
    """One measurement of answers. `note`: what its table shows; `per_task`: questions of each task by default.

    `more`: return a further table of its rows.
    """

    name: str
    title: str
    note: str
    rows: Rows
    claims: Sequence[Claim]
    per_task: int
    encoder: str = TRAINED
    more: Callable[[pd.DataFrame], str] = lambda _: ""


def answer_over_pool(arms: Arms, *, with_guesses: bool = False) -> Rows:
    """Return the rows of these arms over one pool. `with_guesses`: and those of the better guess, `majority`."""

    def rows(context: Context) -> pa.Table:
        loaded = context.load()
        found = run_all(loaded.bench, arms(loaded), context.per_task, context.folder)
        return pa.concat_tables([found, loaded.bench.majority(context.per_task)]) if with_guesses else found

    return rows


def load_encoder(name: str, workspace: Workspace) -> Encoder:
    """Load `packaged`, `trained`, or an encoder by name or folder."""
    if name == PACKAGED:
        return packaged_encoder()
    return Encoder(str(workspace.encoders / BEST) if name == TRAINED else name)


def write_section(stage: Stage, rows: pd.DataFrame) -> str:
    """Return the stage's tables as Markdown."""
    answers = Answers(rows)
    num_tasks, num_questions = answers.scores(answers.runs[0]).shape
    return "\n".join(
        [
            f"## {stage.title}\n",
            f"{stage.note} {num_tasks} tasks, {num_questions} questions each, greedy; exact match, ROUGE-L for texts."
            " Intervals of arms resample the questions, those of differences also the tasks.\n",
            arms_table(answers),
            claims_table(answers, stage.claims),
            stage.more(rows),
        ]
    )


def write_stage(stage: Stage, rows: pa.Table, folder: Path = PAPER_RESULTS) -> None:
    """Write the rows, the tables and the numbers. Raises: TreeChanged; the files then have names that git ignores."""
    suffix = change_suffix()
    path = folder / f"{stage.name}{suffix}.parquet"
    write_parquet(path, rows)
    found = pd.read_parquet(path)
    section = write_section(stage, found)
    (folder / f"{stage.name}{suffix}.md").write_text(section, encoding="utf-8")
    write_part("paper", stage.name, figures=collect_figures(Answers(found), stage.name), table=section, runs=[])


def run(stage: Stage) -> None:
    """Run the stage as a command."""

    def main(
        per_task: PerTask = stage.per_task,
        encoder: Annotated[
            str, typer.Option(help="packaged, trained, or the name or folder of an encoder")
        ] = stage.encoder,
        root: Root = DEFAULT_ROOT,
        only: Annotated[
            list[str] | None, typer.Option(help="a pool of these tasks only; may be given again; writes no results")
        ] = None,
    ) -> None:
        workspace = Workspace(root)
        out = Console(width=120)
        context = Context(workspace, load_encoder(encoder, workspace), only or read_pool(), per_task, out)
        rows = stage.rows(context)
        if only:
            out.print(write_section(stage, rows.to_pandas()), markup=False)
        else:
            write_stage(stage, rows)

    main.__doc__ = f"Measure: {stage.title.lower()}. {stage.note}"
    typer.run(main)
