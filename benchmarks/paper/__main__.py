"""Run the paper's study stage by stage: `python -m benchmarks.paper all`. Completed steps are not repeated."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.choose import (
    POOL_FILE,
    choose_pool,
    empty_places,
    next_spares,
    read_rounds,
    read_verdicts,
    write_pool,
)
from benchmarks.paper.retrieval.experiments import BEST

Run = Callable[[str, Sequence[str]], None]
"""Run one stage with these arguments until it ends."""
_TRAINED = ("--encoder", str(Workspace().encoders / BEST))
_SWAPS = (False, False, False, True, True)  # whether a place may go to another cluster, round by round
cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
out = Console(width=120)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the study. `minutes`: of one free core, if none of its steps is complete.

    `room`: the folder of this package that holds the stage's module.
    """

    name: str
    minutes: int
    arguments: tuple[str, ...] = ()
    room: str = "stages"

    @property
    def module(self) -> str:
        return ".".join(filter(None, ("benchmarks.paper", self.room, self.name)))


STAGES = (
    Stage("train_pool", 35, room="pool"),
    Stage("choose", 10, room="pool"),
    Stage("retrieval", 90, ("run",), room=""),
    Stage("main_table", 60, _TRAINED),
    Stage("ablations", 120, _TRAINED),
    Stage("baselines", 90, _TRAINED),
    Stage("shares", 60),
    Stage("kinds", 1),
    Stage("conflicts", 75, _TRAINED),
    Stage("auto", 40),
    Stage("errors", 1),
    Stage("companions", 55, _TRAINED),
    Stage("rerank", 25, _TRAINED),
    Stage("natural", 20, _TRAINED),
    Stage("flan_pool", 40, _TRAINED),
    Stage("recipes", 45, _TRAINED),
    Stage("competence", 30),
    Stage("sizes", 15),
    Stage("stream", 8),
    Stage("mixed_pool", 30, _TRAINED),
    Stage("arrivals", 35),
    Stage("gate", 45, _TRAINED),
    Stage("layer_routers", 35, _TRAINED),
    Stage("ensemble", 15, _TRAINED),
    Stage("second_base", 40, _TRAINED),
    Stage("mixed_kinds", 35, _TRAINED),
    Stage("speed", 20, _TRAINED),
    Stage("served", 5),
    Stage("report", 0),
)
QUICK_TASKS = (  # pairs of related tasks that are learnt in few steps
    "past_tense",
    "plural",
    "copy_letters",
    "reverse_letters",
    "question_formation",
    "sentence_negation",
    "senti_hotels",
    "senti_medicine",
)
_ONLY = tuple(word for name in QUICK_TASKS for word in ("--only", name))
QUICK = (Stage("train_pool", 6, _ONLY, room="pool"), Stage("main_table", 4, ("--per-task", "12", *_ONLY)))
"""The quick run: the main table over a few tasks. Its adapters are also those of the whole study."""


@cli.command("all")
def run_all(
    only: Annotated[list[str] | None, typer.Option(help="this stage only; may be given again")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="print the main table over eight tasks; about ten minutes")
    ] = False,
) -> None:
    """Train the pool, measure retrieval and answers, and write the report. The first line estimates the duration."""
    stages = QUICK if quick else STAGES
    run_stages([stage for stage in stages if not only or stage.name in only], run_stage, out)


def run_stages(stages: Sequence[Stage], run: Run, out: Console, pool_file: Path = POOL_FILE) -> None:
    """Run the stages in turn. Skip `choose` if the last round of swaps is complete."""
    stages = [stage for stage in stages if stage.name != "choose" or not _is_fixed(pool_file)]
    total = sum(stage.minutes for stage in stages)
    names = ", ".join(stage.name for stage in stages)
    out.print(f"stages: {names}; about {total} minutes of one free core, less what an earlier run has completed")
    for stage in stages:
        began = time.monotonic()
        if stage.name == "choose":
            choose_with(run, pool_file)
        else:
            run(stage.name, stage.arguments)
        out.print(f"{stage.name}: {(time.monotonic() - began) / 60:.1f} minutes")


@cli.command()
def choose() -> None:
    """Judge the trained adapters and fix the pool. A spare replaces an adapter that does not beat guessing."""
    choose_with(run_stage, POOL_FILE)


def choose_with(run: Run, pool_file: Path) -> None:
    """Judge and train by `run`; keep the verdicts and the number of completed rounds of swaps in `pool_file`.

    After an interruption a new run continues in the same round, so it chooses the same pool.
    """
    listed = read_task_list()
    if _is_fixed(pool_file) or not pool_file.exists():
        run("choose", [])
    for number, any_cluster in list(enumerate(_SWAPS, 1))[read_rounds(pool_file) :]:
        verdicts = read_verdicts(pool_file)
        spares = next_spares(listed, verdicts, any_cluster=any_cluster)
        if spares:
            out.print(f"{len(empty_places(listed, verdicts))} places are empty; training {', '.join(spares)} for them")
            run("train_pool", [word for name in spares for word in ("--only", name)])
            run("choose", [])
            verdicts = read_verdicts(pool_file)
        write_pool(pool_file, choose_pool(listed, verdicts), verdicts.values(), number)


def _is_fixed(pool_file: Path) -> bool:
    return read_rounds(pool_file) == len(_SWAPS)


def run_stage(name: str, arguments: Sequence[str]) -> None:
    """Run the stage in a process of its own, which frees its memory. Raises: CalledProcessError; a new run resumes."""
    [stage] = [stage for stage in STAGES if stage.name == name]
    subprocess.run([sys.executable, "-m", stage.module, *arguments], check=True)


if __name__ == "__main__":
    cli()
