"""Measure how many adapters to compose, and with which weights: `python -m benchmarks.paper.stages.ablations`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import typer
from rich.console import Console

from benchmarks import plots
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import run_all
from benchmarks.paper.common.markdown import percent, plot, table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.main_table import load_bench
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "ablations.parquet"
NUM_ADAPTERS = (1, 2, 3, 5, 8, 10, 15)
_MASKED = {"iid": False, "ood": True}


def methods_of(numbers: tuple[int, ...] = NUM_ADAPTERS) -> dict[str, Routed]:
    """Return mixture and fusion of each number of adapters, and the mixture with softmax weights of the scores."""
    found = {
        f"{strategy}_k{number}_{name}": Routed(strategy, number, masks_own=masked)
        for number in numbers
        for strategy in ("mixture", "fusion")
        for name, masked in _MASKED.items()
    }
    return found | {f"softmax_{name}": Routed("mixture", 3, "softmax", masked) for name, masked in _MASKED.items()}


def numbers_table(answers: Answers, numbers: tuple[int, ...] = NUM_ADAPTERS) -> str:
    """Return a row per number of adapters."""
    kinds = [(strategy, name) for strategy in ("mixture", "fusion") for name in _MASKED]
    rows = [
        [str(number), *[answers.interval(f"{strategy}_k{number}_{name}").in_percent() for strategy, name in kinds]]
        for number in numbers
    ]
    return table(["k", *[" ".join(kind) for kind in kinds]], rows)


def weights_table(answers: Answers) -> str:
    """Compare uniform and softmax weights of the three best."""
    rows = [
        [name, *[percent(answers.interval(run).mean) for run in (f"mixture_k3_{name}", f"softmax_{name}")]]
        for name in _MASKED
    ]
    pairs = [(f"softmax_{name}", f"mixture_k3_{name}") for name in _MASKED]
    return table(["", "uniform", "softmax"], rows) + "\n" + differences(answers, pairs)


def write_tables(folder: Path) -> None:
    """Write the section of the report and its plot from the rows in `folder`."""
    clusters = {name: spec.cluster for name, spec in read_task_list().by_name.items()}
    answers = Answers(pd.read_parquet(folder / ROWS), clusters)
    num_tasks, num_questions = answers.scores(answers.runs[0]).shape
    parts = [
        "## How many adapters, and their weights\n",
        f"{num_tasks} tasks, {num_questions} test questions each; percent with 95 % intervals.\n",
        plot("num_adapters", "score by the number of adapters"),
        numbers_table(answers),
        "Three adapters, weights uniform or softmax(score / 0.05):\n",
        weights_table(answers),
    ]
    (folder / "ablations.md").write_text("\n".join(parts), encoding="utf-8")
    curves = {
        f"{strategy}, {name}": [(k, 100 * answers.interval(f"{strategy}_k{k}_{name}").mean) for k in NUM_ADAPTERS]
        for strategy in ("mixture", "fusion")
        for name in _MASKED
    }
    plots.lines("paper/num_adapters", curves, "adapters", "score, %", log_x=False)


def main(
    per_task: PerTask = 20,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Answer under every number of adapters, then write rows, table and plot."""
    workspace = Workspace(root)
    bench = load_bench(workspace, encoder, Console(width=120)).bench
    write_parquet(PAPER_RESULTS / ROWS, run_all(bench, methods_of(), per_task, workspace.rows / "ablations"))
    write_tables(PAPER_RESULTS)


if __name__ == "__main__":
    typer.run(main)
