"""The whole study, stage by stage: `python -m benchmarks.paper all`. What is done is not done again."""

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

from benchmarks.paper.choose import (
    POOL_FILE,
    choose_pool,
    empty_places,
    next_spares,
    read_rounds,
    read_verdicts,
    write_pool,
)
from benchmarks.paper.retrieval.cells import BEST
from benchmarks.paper.tasks import read_task_list
from benchmarks.paper.workspace import Workspace

Run = Callable[[str, Sequence[str]], None]
"""Runs one module of this package to its end with these arguments."""
_TRAINED = ("--encoder", str(Workspace().encoders / BEST))
_SWAPS = (False, False, False, True, True)  # whether a place may go to another cluster, round by round
cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
out = Console(width=120)


@dataclass(frozen=True, slots=True)
class Stage:
    """A module of this package; `minutes` of one free core, where nothing of it is kept."""

    name: str
    minutes: int
    arguments: tuple[str, ...] = ()


STAGES = (
    Stage("train_pool", 35),
    Stage("choose", 10),
    Stage("retrieval", 60, ("run",)),
    Stage("main_table", 60, _TRAINED),
    Stage("ablations", 120, _TRAINED),
    Stage("baselines", 60, _TRAINED),
    Stage("shares", 60),
    Stage("kinds", 1),
    Stage("conflicts", 35, _TRAINED),
    Stage("mixed_pool", 30, _TRAINED),
    Stage("arrivals", 35),
    Stage("gate", 25, _TRAINED),
    Stage("speed", 20, _TRAINED),
    Stage("served", 5),
    Stage("report", 0),
)


@cli.command("all")
def run_all(only: Annotated[list[str] | None, typer.Option(help="this stage only; may be given again")] = None) -> None:
    """Train the pool, measure retrieval and answers, write the report; told first is how long that takes."""
    run_stages([stage for stage in STAGES if not only or stage.name in only], run_stage, out)


def run_stages(stages: Sequence[Stage], run: Run, out: Console, pool_file: Path = POOL_FILE) -> None:
    """Each in turn. A pool whose last round of swaps is over is not chosen again."""
    stages = [stage for stage in stages if stage.name != "choose" or not _is_fixed(pool_file)]
    total = sum(stage.minutes for stage in stages)
    names = ", ".join(stage.name for stage in stages)
    out.print(f"stages: {names}; from nothing about {total} minutes of one free core, less what is kept")
    for stage in stages:
        began = time.monotonic()
        if stage.name == "choose":
            choose_with(run, pool_file)
        else:
            run(stage.name, stage.arguments)
        out.print(f"{stage.name}: {(time.monotonic() - began) / 60:.1f} minutes")


@cli.command()
def choose() -> None:
    """Judge what is trained and fix the pool; what does not beat guessing is swapped for a spare."""
    choose_with(run_stage, POOL_FILE)


def choose_with(run: Run, pool_file: Path) -> None:
    """`run` judges and trains; what it judged is in `pool_file`, with the rounds of swaps that are over.

    Interrupted, it goes on with the round it was in, so that the pool is the same.
    """
    listed = read_task_list()
    if _is_fixed(pool_file) or not pool_file.exists():
        run("choose", [])
    for number, any_cluster in list(enumerate(_SWAPS, 1))[read_rounds(pool_file) :]:
        verdicts = read_verdicts(pool_file)
        spares = next_spares(listed, verdicts, any_cluster=any_cluster)
        if spares:
            out.print(f"{len(empty_places(listed, verdicts))} places are empty; trained for them: {', '.join(spares)}")
            run("train_pool", [word for name in spares for word in ("--only", name)])
            run("choose", [])
            verdicts = read_verdicts(pool_file)
        write_pool(pool_file, choose_pool(listed, verdicts), verdicts.values(), number)


def _is_fixed(pool_file: Path) -> bool:
    return read_rounds(pool_file) == len(_SWAPS)


def run_stage(name: str, arguments: Sequence[str]) -> None:
    """A process of its own: its memory is free afterwards. Raises: CalledProcessError; run again to go on."""
    subprocess.run([sys.executable, "-m", f"benchmarks.paper.{name}", *arguments], check=True)


if __name__ == "__main__":
    cli()
