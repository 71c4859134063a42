"""Measure the paper's main table: `python -m benchmarks.paper.stages.main_table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from rich.console import Console

from benchmarks.paper.answering.methods import MAIN
from benchmarks.paper.answering.runs import Bench, pool_retriever, run_all
from benchmarks.paper.answering.study import Weights, load_asker, load_study, worker_config
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import NUM_TEST, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.stages.answer_tables import COMPARED, ROWS, Answers, write_tables
from lora_store import LoraStore
from retriever_svc import Encoder
from retriever_svc.encoder_files import ENGLISH_MODEL


@dataclass(frozen=True, slots=True)
class Loaded:
    """The fixed pool behind the server's engine and Retriever, and the source of the engine's weights."""

    bench: Bench
    store: LoraStore
    weights: Weights


def load_bench(workspace: Workspace, encoder: str, out: Console) -> Loaded:
    return load_loaded(workspace, Encoder(encoder), out)


def load_loaded(
    workspace: Workspace, encoder: Encoder, out: Console, name: str = "pool", tasks: Sequence[str] = ()
) -> Loaded:
    """Load the fixed pool, or only these tasks; `name`: of its store."""
    listed, names = read_task_list().by_name, list(tasks) or read_pool()
    config = worker_config(len(names))
    study = load_study([listed[name] for name in names], workspace, config)
    asker, store, weights = load_asker(workspace, config, names)
    return Loaded(Bench(study, asker, pool_retriever(study, asker, encoder, name), out), store, weights)


def show(bench: Bench, per_task: int) -> None:
    """Print the main table of a small pool and its differences. Write no results."""
    rows = run_all(bench, MAIN, per_task, bench.study.workspace.rows / "quick")
    rows = pa.concat_tables([rows, bench.majority(per_task)])
    answers = Answers(rows.to_pandas(), {name: spec.cluster for name, spec in bench.study.specs.items()})
    bench.out.print(f"{len(bench.study.specs)} tasks, {per_task} questions each, percent right:", markup=False)
    for run in answers.runs:
        bench.out.print(f"{run.replace('_', ' '):16}{answers.interval(run).in_percent()}", markup=False)
    for one, other in (pair for pair in COMPARED if set(pair) <= set(answers.runs)):
        words = f"{one} - {other}".replace("_", " ")
        bench.out.print(f"{words:32}{answers.difference(one, other).in_percent()} points", markup=False)


def main(
    per_task: PerTask = NUM_TEST,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
    only: Annotated[
        list[str] | None, typer.Option(help="a pool of these tasks only; may be given again; writes no results")
    ] = None,
) -> None:
    """Answer the test questions under every method, then write rows, tables and numbers. Reuse known answers."""
    workspace = Workspace(root)
    if only:
        show(load_loaded(workspace, Encoder(encoder), Console(width=120), "quick", only).bench, per_task)
        return
    bench = load_bench(workspace, encoder, Console(width=120)).bench
    rows = run_all(bench, MAIN, per_task, workspace.rows / "answers")
    rows = pa.concat_tables([rows, bench.majority(per_task)])
    write_parquet(PAPER_RESULTS / ROWS, rows)
    write_tables(PAPER_RESULTS, Path(encoder).name)


if __name__ == "__main__":
    typer.run(main)
