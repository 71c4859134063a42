"""Run `loraretriever batch`."""

from __future__ import annotations

import time
from pathlib import Path

from ray.exceptions import RayError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deployments.api.pool_responses import unserved_text
from deployments.batch.run import BatchRun, BatchSettings, begin
from deployments.cli.client import counted, err, out, print_json, show_error
from deployments.config.app import AppConfig
from deployments.config.loading import load_config
from deployments.errors import BatchRefused
from deployments.json_types import JsonObject
from lora_store import LoraStoreError


def run_batch(settings: BatchSettings, *, address: str | None, concurrency: int, as_json: bool = False) -> int:
    """Answer all rows. Return the exit code: 0 once every part is written, even if rows have errors.

    `as_json`: print an object for scripts at the end.
    """
    started, num_errors = time.monotonic(), 0
    try:
        run = begin(settings)
        if not as_json:
            out.print(_summary(run), markup=False)
            for base_model, num_adapters in run.unserved:
                show_error(unserved_text(base_model, num_adapters))
        if run.parts:
            num_errors = _answer(run, address, concurrency)
    except (BatchRefused, LoraStoreError, ConnectionError, RayError) as exc:
        return fail(str(exc))
    except KeyboardInterrupt:
        return fail("interrupted: run the same command again to resume")
    took_s = time.monotonic() - started
    if as_json:
        counted = {"rows": run.source.num_rows, "answered": run.num_rows_left, "errors": num_errors}
        print_json(
            {"output": settings.output_uri, "generation": run.generation, **counted, "seconds": round(took_s, 1)}
        )
        return 0
    if run.parts:
        out.print(f"{run.num_rows_left} rows in {took_s:.0f} s, {num_errors} of them with errors", markup=False)
    out.print(f"wrote all {run.source.num_rows} rows to {settings.output_uri}", markup=False)
    return 0


def configured(file: Path | None, store: str | None, retrieval: JsonObject) -> AppConfig:
    """Return the settings of the file, overridden by the command line. Raises: SettingsInvalid."""
    return load_config(file, retrieval=retrieval, **({} if store is None else {"store_uri": store}))


def fail(message: str) -> int:
    """Print an error and return the exit code 1."""
    show_error(message)
    return 1


def _summary(run: BatchRun) -> str:
    done = f", {run.num_done} of them already done" if run.num_done else ""
    parts = f"{counted(run.source.num_rows, 'row')} in {counted(run.num_done + len(run.parts), 'part')}{done}"
    return f"{parts}; {counted(run.num_adapters, 'adapter')} at generation {run.generation}"


def _answer(run: BatchRun, address: str | None, concurrency: int) -> int:
    """Start Ray and answer the remaining rows with a progress bar. Return the number of rows with errors."""
    from deployments.batch.dataset import answer_parts, cluster  # torch takes seconds to import

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    num_errors, settings = 0, run.settings
    with (
        cluster(settings.engine_cpus + settings.config.retriever_scaling.num_cpus, address, concurrency),
        Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress,
    ):
        task = progress.add_task("rows", total=run.num_rows_left)
        for part in answer_parts(run, concurrency):
            num_errors += part["num_errors"]
            progress.update(task, advance=part["num_rows"], description=f"rows, {num_errors} with errors")
    return num_errors
