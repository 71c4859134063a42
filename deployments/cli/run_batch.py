"""What `loraretriever batch` does, once the command line is read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deployments.batch.dataset import answer_parts, cluster
from deployments.batch.run import BatchRun, BatchSettings, begin
from deployments.cli.client import err, out
from deployments.config.app import AppConfig, load_config
from deployments.errors import BatchRefused
from lora_store import LoraStoreError


def run_batch(settings: BatchSettings, *, address: str | None, concurrency: int) -> int:
    """The exit code: 0 once every part is there, rows with an error among them or not."""
    try:
        run = begin(settings)
        out.print(_beginning(run), markup=False)
        if run.parts:
            with cluster(settings.config, address, concurrency):
                out.print(_answer(run, concurrency), markup=False)
    except (BatchRefused, LoraStoreError, ConnectionError, RayError) as exc:
        return fail(str(exc))
    except KeyboardInterrupt:
        return fail("interrupted: the same command goes on where it was")
    out.print(f"all {run.source.num_rows} rows are in {settings.output_uri}", markup=False)
    return 0


def configured(file: Path | None, store: str | None, retrieval: dict[str, Any]) -> AppConfig:
    """The file's settings with those of the command line over them. Raises: ValueError."""
    config = load_config(file, **({} if store is None else {"store_uri": store}))
    return AppConfig.model_validate(config.model_dump() | {"retrieval": config.retrieval.model_dump() | retrieval})


def fail(message: str) -> int:
    err.print(message, style="red", markup=False, soft_wrap=True)
    return 1


def _beginning(run: BatchRun) -> str:
    done = f", {run.num_done} of them done before" if run.num_done else ""
    parts = f"{run.source.num_rows} rows in {run.num_done + len(run.parts)} parts{done}"
    return f"{parts}; {run.num_adapters} adapters at generation {run.generation}"


def _answer(run: BatchRun, concurrency: int) -> str:
    """Answer what is left, showing how far it is; what to say at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started, num_errors = time.monotonic(), 0
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("rows", total=run.num_rows_left)
        for part in answer_parts(run, concurrency):
            num_errors += part["num_errors"]
            progress.update(task, advance=part["num_rows"], description=f"rows, {num_errors} with an error")
    took_s = time.monotonic() - started
    return f"{run.num_rows_left} rows in {took_s:.0f} s, {num_errors} of them with an error"
