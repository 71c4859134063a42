"""Run the paper's study: `python -m benchmarks.paper all`. Completed steps are not repeated."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
out = Console(width=120)


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the study, in a process of its own, which frees its memory.

    `minutes`: of one free core, if none of it is complete. `takes_per_task`: whether it has `--per-task`.
    """

    name: str
    module: str
    minutes: int
    arguments: tuple[str, ...] = ()
    takes_per_task: bool = True


STEPS = (
    Step("train_pool", "pool.train_pool", 35, takes_per_task=False),
    Step("retrieval", "retrieval", 70, ("run",), takes_per_task=False),
    Step("main_table", "stages.main_table", 60),
    Step("ablations", "stages.ablations", 120),
    Step("lorahub", "stages.lorahub", 40),
    Step("sizes", "stages.sizes", 15),
    Step("second_base", "stages.second_base", 40),
    Step("defaults", "stages.defaults", 15),
    Step("integers", "stages.integers", 15),
)
QUICK_TASKS = (
    "past_tense",
    "plural",
    "copy_letters",
    "reverse_letters",
    "question_formation",
    "sentence_negation",
    "senti_hotels",
    "senti_medicine",
)
"""Pairs of related tasks that are learnt in few steps. Their adapters are also those of the whole study."""
_ONLY = tuple(word for name in QUICK_TASKS for word in ("--only", name))
QUICK = (
    Step("train_pool", "pool.train_pool", 6, _ONLY, takes_per_task=False),
    Step("main_table", "stages.main_table", 4, ("--per-task", "12", "--encoder", "packaged", *_ONLY)),
)
Run = Callable[[Step], None]


@cli.callback()
def name_commands() -> None:
    """Keep the name of the only command on the command line."""


@cli.command("all")
def run_all(
    only: Annotated[list[str] | None, typer.Option(help="this stage only; may be given again")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="print the main table over eight tasks; about ten minutes")
    ] = False,
    per_task: Annotated[int | None, typer.Option(min=1, help="questions for each task, with `--only`")] = None,
) -> None:
    """Train the pool, measure retrieval and answers, and write the tables. The first line estimates the duration."""
    run_steps(choose_steps(QUICK if quick else STEPS, only or (), per_task), start_process)


def choose_steps(steps: Sequence[Step], only: Sequence[str], per_task: int | None) -> list[Step]:
    """Return the steps to run, with their arguments. Raises: typer.BadParameter."""
    if unknown := set(only) - {step.name for step in steps}:
        raise typer.BadParameter(f"no such stage: {', '.join(sorted(unknown))}", param_hint="--only")
    wanted = [step for step in steps if not only or step.name in only]
    if per_task is None:
        return wanted
    if not only:
        raise typer.BadParameter("only together with --only", param_hint="--per-task")
    if others := [step.name for step in wanted if not step.takes_per_task]:
        raise typer.BadParameter(f"not for {', '.join(others)}", param_hint="--per-task")
    asked = ("--per-task", str(per_task))
    return [Step(step.name, step.module, step.minutes, (*step.arguments, *asked)) for step in wanted]


def run_steps(steps: Sequence[Step], start: Run) -> None:
    """Run the steps in order. The first that fails ends the run."""
    total = sum(step.minutes for step in steps)
    names = ", ".join(step.name for step in steps)
    out.print(f"stages: {names}; about {total} minutes of one free core, less what an earlier run has completed")
    for step in steps:
        began = time.monotonic()
        start(step)
        out.print(f"{step.name}: {(time.monotonic() - began) / 60:.1f} minutes")


def start_process(step: Step) -> None:
    """Run one step to its end. Raises: CalledProcessError; a new run resumes."""
    subprocess.run([sys.executable, "-m", f"benchmarks.paper.{step.module}", *step.arguments], check=True)


if __name__ == "__main__":
    cli()
