"""Run the paper's study, two stages at a time: `python -m benchmarks.paper all`. Completed steps are not repeated."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
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
from gpu_worker.front.cpu_count import usable_cpus

Run = Callable[[str, Sequence[str]], None]
"""Run one stage with these arguments until it ends."""
_TRAINED = ("--encoder", str(Workspace().encoders / BEST))
_SWAPS = (False, False, False, True, True)  # whether a place may go to another cluster, round by round
cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
out = Console(width=120)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the study. `minutes`: of one free core, if none of its steps is complete.

    `room`: the folder of this package that holds the stage's module. `alone`: it starts when all stages before it have
    ended, and those after it wait for its end, because of its results or because it measures times.
    """

    name: str
    minutes: int
    arguments: tuple[str, ...] = ()
    room: str = "stages"
    alone: bool = False

    @property
    def module(self) -> str:
        return ".".join(filter(None, ("benchmarks.paper", self.room, self.name)))


STAGES = (
    Stage("train_pool", 35, room="pool", alone=True),
    Stage("choose", 10, room="pool", alone=True),
    Stage("retrieval", 90, ("run",), room="", alone=True),
    Stage("main_table", 60, _TRAINED),
    Stage("ablations", 120, _TRAINED),
    Stage("baselines", 90, _TRAINED),
    Stage("shares", 60),
    Stage("kinds", 1),
    Stage("conflicts", 75, _TRAINED),
    Stage("auto", 40),
    Stage("companions", 55, _TRAINED),
    Stage("rerank", 25, _TRAINED),
    Stage("natural", 20, _TRAINED),
    Stage("errors", 1, alone=True),
    Stage("flan_pool", 40, _TRAINED, alone=True),
    Stage("rerank_flan", 10, _TRAINED),
    Stage("flan_bbq", 40, _TRAINED),
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
    Stage("speed", 20, _TRAINED, alone=True),
    Stage("served", 5, alone=True),
    Stage("report", 0, alone=True),
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
QUICK = (
    Stage("train_pool", 6, _ONLY, room="pool", alone=True),
    Stage("main_table", 4, ("--per-task", "12", *_ONLY), alone=True),
)
"""The quick run: the main table over a few tasks. Its adapters are also those of the whole study."""


@cli.command("all")
def run_all(
    only: Annotated[list[str] | None, typer.Option(help="this stage only; may be given again")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="print the main table over eight tasks; about ten minutes")
    ] = False,
    per_task: Annotated[int | None, typer.Option(min=1, help="questions for each task, with `--only`")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="stages at a time, which share the cores; each needs about 6 GB of memory")
    ] = 2,
) -> None:
    """Train the pool, measure retrieval and answers, and write the report. The first line estimates the duration."""
    stages = QUICK if quick else STAGES
    if unknown := set(only or ()) - {stage.name for stage in stages}:
        raise typer.BadParameter(f"no such stage: {', '.join(sorted(unknown))}", param_hint="--only")
    wanted = [stage for stage in stages if not only or stage.name in only]
    if per_task is not None:
        if not only:
            raise typer.BadParameter("only together with --only", param_hint="--per-task")
        if other := [stage.name for stage in wanted if not takes_per_task(stage)]:
            raise typer.BadParameter(f"not for {', '.join(other)}", param_hint="--per-task")
        asked = ("--per-task", str(per_task))
        wanted = [replace(stage, arguments=(*stage.arguments, *asked)) for stage in wanted]
    jobs = max(1, min(jobs, sum(not stage.alone for stage in wanted)))
    run_stages(wanted, partial(run_stage, jobs=jobs), out, jobs=jobs)


def takes_per_task(stage: Stage) -> bool:
    main = getattr(importlib.import_module(stage.module), "main", None)
    return main is not None and "per_task" in inspect.signature(main).parameters


def run_stages(stages: Sequence[Stage], run: Run, out: Console, pool_file: Path = POOL_FILE, *, jobs: int = 1) -> None:
    """Run the stages in order, up to `jobs` at a time. Skip `choose` if the last round of swaps is complete.

    If one fails, those that run still end, no other starts, and the error is raised.
    """
    stages = [stage for stage in stages if stage.name != "choose" or not _is_fixed(pool_file)]
    total = sum(stage.minutes for stage in stages)
    names = ", ".join(stage.name for stage in stages)
    out.print(f"stages: {names}; about {total} minutes of one free core, less what an earlier run has completed")
    stops = threading.Event()

    def timed(stage: Stage) -> None:
        if stops.is_set():
            return
        began = time.monotonic()
        try:
            if stage.name == "choose":
                choose_with(run, pool_file)
            else:
                run(stage.name, stage.arguments)
        except BaseException:
            stops.set()
            out.print(f"{stage.name} failed. The stages that run will end, and no other starts.")
            raise
        out.print(f"{stage.name}: {(time.monotonic() - began) / 60:.1f} minutes")

    for is_alone, group in itertools.groupby(stages, lambda stage: stage.alone):
        with ThreadPoolExecutor(1 if is_alone else jobs) as threads:
            running = [threads.submit(timed, stage) for stage in group]
            try:
                for ended in running:
                    ended.result()
            except BaseException:
                stops.set()
                raise


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


def run_stage(name: str, arguments: Sequence[str], jobs: int = 1) -> None:
    """Run the stage in a process of its own, which frees its memory. Raises: CalledProcessError; a new run resumes.

    Of `jobs` stages at a time each has its part of the cores.
    """
    [stage] = [stage for stage in STAGES if stage.name == name]
    num_threads = max(1, usable_cpus() // (1 if stage.alone else jobs))
    environment = {"OMP_NUM_THREADS": str(num_threads)} | os.environ
    subprocess.run([sys.executable, "-m", stage.module, *arguments], check=True, env=environment)


if __name__ == "__main__":
    cli()
