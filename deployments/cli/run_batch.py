"""Run `loraretriever batch`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import ray
from ray.exceptions import RayError
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from deployments.api.pool_responses import unserved_text
from deployments.batch.output import BatchOutput
from deployments.batch.run import BatchRun, BatchSettings, begin
from deployments.cli.output import counted, fail, print_json, progress, say, show_error, show_warning
from deployments.errors import BatchRefused, RayUnauthenticated
from lora_store import LoraStoreError

_REPORTED = re.compile(  # our errors and those of files in a stack trace, where the cause of an error precedes it
    r"^(?:(?:lora_store|retriever_svc|gpu_worker|deployments)(?:\.\w+)+|OSError|FileNotFoundError): (.+?)(?=\n\n|\Z)",
    re.DOTALL | re.MULTILINE,
)


def run_batch(settings: BatchSettings, *, address: str | None, concurrency: int, as_json: bool = False) -> None:
    """Answer all rows, even if some have errors. If a part cannot be written, print why and exit.

    `as_json`: print an object for scripts at the end.
    """
    started, num_errors = time.monotonic(), 0
    try:
        run = begin(settings)
        if not as_json:
            say(_summary(run))
            for base_model, num_adapters in run.unserved:
                show_error(unserved_text(base_model, num_adapters))
        if run.parts:
            num_errors = _answer(run, address, concurrency)
            _check_parts(run)
    except RayError as exc:
        fail(f"{_cause(exc)}; the same command continues the run")
    except (BatchRefused, RayUnauthenticated, LoraStoreError, OSError) as exc:
        fail(exc)
    except KeyboardInterrupt:
        fail("interrupted: run the same command again to resume")
    took_s = time.monotonic() - started
    if as_json:
        rows = {"rows": run.source.num_rows, "answered": run.num_rows_left, "errors": num_errors}
        print_json({"output": settings.output_uri, "generation": run.generation, **rows, "seconds": round(took_s, 1)})
        return
    if run.parts:
        say(f"{run.num_rows_left} rows in {took_s:.0f} s, {num_errors} of them with errors")
    say(f"wrote all {run.source.num_rows} rows to {settings.output_uri}")


def _cause(error: RayError) -> str:
    """Return the message of the error that ended a process of the run; all that Ray says where it is not expected."""
    reported = _REPORTED.findall(str(error))
    return reported[-1] if reported else str(error)


def _summary(run: BatchRun) -> str:
    done = f", {run.num_done} of them already done" if run.num_done else ""
    parts = f"{counted(run.source.num_rows, 'row')} in {counted(run.num_done + len(run.parts), 'part')}{done}"
    return f"{parts}; {counted(run.num_adapters, 'adapter')} at generation {run.generation}"


def _answer(run: BatchRun, address: str | None, concurrency: int) -> int:
    """Start Ray and answer the remaining rows with a progress bar. Return the number of rows with errors."""
    from deployments.batch.dataset import answer_parts, cluster  # torch takes seconds to import

    num_errors, settings = 0, run.settings
    num_cpus_each = settings.engine_cpus + settings.config.retriever_scaling.num_cpus
    is_open = settings.config.allow_unauthenticated_ray
    with (
        cluster(num_cpus_each, address, concurrency, allow_unauthenticated=is_open),
        progress("rows", MofNCompleteColumn(), TimeRemainingColumn(), total=run.num_rows_left) as update,
    ):
        _check_resources({"CPU": num_cpus_each, "GPU": settings.engine_gpus}, address)
        for part in answer_parts(run, concurrency):
            num_errors += part["num_errors"]
            update(advance=part["num_rows"], description=f"rows, {num_errors} with errors")
    return num_errors


def _check_parts(run: BatchRun) -> None:
    """Check that all parts are where this process reads the output. Raises: BatchRefused."""
    missing = {part.number for part in run.parts} - BatchOutput(run.settings.output_uri).done()
    if missing:
        raise BatchRefused(
            f"{len(missing)} of {len(run.parts)} parts are not in {run.settings.output_uri}: machines of the"
            " cluster wrote them to their own disks; name a bucket, or a folder that all of them share"
        )


def _check_resources(needed: Mapping[str, float], address: str | None) -> None:
    """Say what the run waits for, as Ray does not. Raises: BatchRefused if this machine will never have it."""
    found = ray.cluster_resources() if address is None else ray.available_resources()
    for name, number in needed.items():
        if number > (num_found := found.get(name, 0)):
            if address is None:
                raise BatchRefused(
                    f"an engine needs {number:g} {name}, and Ray finds {num_found:g} on this machine: change"
                    " worker.device in the settings, or name a cluster with --address"
                )
            show_warning(f"waiting until the cluster has {number:g} free {name}; now it has {num_found:g}")
