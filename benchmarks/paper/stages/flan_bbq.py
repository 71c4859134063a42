"""Test the paper's relation on a second pool like Flan: `python -m benchmarks.paper.stages.flan_bbq`.

Its tasks are those of BIG-bench's bbq: questions about two people with three options, on nine subjects. Half of the
tasks are ambiguous, and their answer is always that the question cannot be answered. So this pool has one form and two
functions, where multiemo's pool (`flan_pool`) has one of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import typer
from rich.console import Console

from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.stages.answer_tables import Answers, differences, main_table
from benchmarks.paper.stages.flan_pool import PAIRS, load_pool, measure
from benchmarks.training.bigbench_tasks import TaskSpec
from retriever_svc.encoder_files import ENGLISH_MODEL

NAME = "flan_bbq"
ROWS = f"{NAME}.parquet"
FUNCTIONS = ("ambig", "disambig")  # how the names of the tasks end
_LEADS = [("mixture_iid", "selection_iid"), ("mixture_ood", "selection_ood"), ("mixture_ood", "majority")]


def bbq_tasks(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Return every task of bbq, sorted by name."""
    return sorted((spec for spec in specs if "/bbq_lite_json/" in spec.path), key=lambda spec: spec.name)


def function_of(task: str) -> str:
    return task.rpartition("_")[2]


def sentence(folder: Path) -> str:
    """Return the scores that the paper compares."""
    if not (folder / ROWS).exists():
        return "A second pool was not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    means = {run: percent(answers.interval(run).mean) for run in answers.runs}
    leads = [answers.difference(f"mixture_{pool}", f"selection_{pool}").in_percent() for pool in ("iid", "ood")]
    ambiguous, others = (
        answers.difference_on("mixture_ood", "selection_ood", lambda task, end=end: task.endswith(f"_{end}"))
        for end in FUNCTIONS
    )
    return (
        f"On the {len(answers.scores('perfect'))} tasks of bbq, one form and two functions, the mixture has"
        f" {means['mixture_iid']} % in distribution and selection {means['selection_iid']} %, out of distribution"
        f" {means['mixture_ood']} and {means['selection_ood']} % (guessing {means['majority']} %): leads of {leads[0]}"
        f" and {leads[1]} points. The second is {ambiguous.in_percent()} on the tasks whose answer is always that the"
        f" question cannot be answered, and {others.in_percent()} on the others."
    )


def by_function(answers: Answers) -> str:
    """Return the paper's differences on the tasks of each function."""

    def cells(function: str) -> list[str]:
        found = [answers.difference_on(*pair, lambda task: function_of(task) == function) for pair in _LEADS]
        return [difference.in_percent() for difference in found]

    lines = [[function, *cells(function)] for function in FUNCTIONS]
    return table(["tasks", *[f"{one} − {other}".replace("_", " ") for one, other in _LEADS]], lines)


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    answers = Answers(rows, {task: function_of(task) for task in rows["task"].unique()})
    tasks, questions = answers.scores("perfect").shape
    return "\n".join(
        [
            "## A second pool like Flan\n",
            f"{tasks} tasks of bbq, {questions} questions each. `ambig`: the answer is always that the question cannot"
            " be answered; `disambig`: the text says who is meant.\n",
            main_table(answers),
            differences(answers, PAIRS),
            "By function, in points:\n",
            by_function(answers),
        ]
    )


def main(per_task: PerTask = 25, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Train the pool's adapters, then measure."""
    specs = bbq_tasks(list(read_task_list().by_name.values()))
    bench = load_pool(specs, Workspace(root), encoder, Console(width=120), NAME).bench
    (PAPER_RESULTS / f"{NAME}.md").write_text(section(measure(bench, PAPER_RESULTS, per_task, NAME)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
