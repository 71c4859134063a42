"""The whole study, stage by stage: `python -m benchmarks.paper all`. What is done is not done again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.paper.choose import POOL_FILE, empty_places, next_spares, read_verdicts
from benchmarks.paper.tasks import read_task_list

_CORE_MINUTES = {
    "train_pool": 35,
    "choose": 10,
    "retrieval": 60,
    "main_table": 60,
    "baselines": 60,
    "ablations": 120,
    "report": 0,
}
_MOST_SWAPS = 3
cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
out = Console(width=120)


@cli.command("all")
def run_all(only: Annotated[list[str] | None, typer.Option(help="this stage only; may be given again")] = None) -> None:
    """Train the pool, measure retrieval and answers, write the report; told first is how long that takes."""
    stages = [stage for stage in _CORE_MINUTES if not only or stage in only]
    stages = [stage for stage in stages if stage != "choose" or not POOL_FILE.exists()]
    total = sum(_CORE_MINUTES[stage] for stage in stages)
    out.print(f"stages: {', '.join(stages)}; from nothing about {total} minutes of one free core, less what is kept")
    for stage in stages:
        began = time.monotonic()
        if stage == "choose":
            choose()
        else:
            run_stage(stage, ["run"] if stage == "retrieval" else [])
        out.print(f"{stage}: {(time.monotonic() - began) / 60:.1f} minutes")


@cli.command()
def choose() -> None:
    """Judge what is trained and fix the pool; what does not beat guessing is swapped for a spare of its cluster."""
    run_stage("choose", [])
    listed = read_task_list()
    for _ in range(_MOST_SWAPS):
        verdicts = read_verdicts()
        spares = next_spares(listed, verdicts)
        if not spares:
            break
        out.print(f"{len(empty_places(listed, verdicts))} places are empty; trained for them: {', '.join(spares)}")
        run_stage("train_pool", [word for name in spares for word in ("--only", name)])
        run_stage("choose", [])


def run_stage(name: str, arguments: Sequence[str]) -> None:
    """A process of its own: its memory is free afterwards. Raises: CalledProcessError; run again to go on."""
    subprocess.run([sys.executable, "-m", f"benchmarks.paper.{name}", *arguments], check=True)


if __name__ == "__main__":
    cli()
