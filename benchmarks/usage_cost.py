"""Measure what recording usage costs, against the time of an answer: `python -m benchmarks.usage_cost`, seconds.

One replica records events, sends them every ten seconds, and its Store writes and merges them, all in this process. A
server with `results/http`'s tokens a second takes so long for an answer on all its cores; an event is charged in full.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engine_cases import NUM_NEW, Quick, shown, table_of
from benchmarks.http import HTTP_AUTO, HTTP_ONE
from benchmarks.results_file import RESULTS, machine, processor_of, write_results
from deployments.auth.authenticator import LOCAL_CALLER
from deployments.observability.request_context import RequestContext, RowTimes
from deployments.observability.usage import SEND_EVERY_S, UsageLog
from gpu_worker.front.request.request import Delta
from lora_store import Location
from lora_store.usage import UsageFiles

NUM_ADAPTERS = 3  # in each request's plan
_KEPT = timedelta(days=400)


def make_request(number: int) -> RequestContext:
    """Return an answered request, as the Ingress remembers it."""
    context = RequestContext(f"{number:032x}", "/v1/chat/completions", "POST", caller=LOCAL_CALLER, status=200)
    context.model, context.base_model = "auto", "gemma-3-270m"
    context.used = tuple((f"local/adapter-{place}", "ab" * 32, 1 / NUM_ADAPTERS) for place in range(NUM_ADAPTERS))
    now = time.monotonic()
    context.rows = {0: RowTimes(now, 1, now, Delta("", 40, NUM_NEW, "stop", queued_s=0.01))}
    return context


def measure(folder: Path, num_segments: int, per_segment: int) -> list[dict[str, float]]:
    """Return the CPU microseconds of each event in each segment: to record it, and to send and store it."""
    files = UsageFiles(Location(str(folder)).child("usage"))

    async def send(segment: str, lines: bytes) -> None:
        await asyncio.to_thread(files.put, segment, lines, datetime.now(UTC), _KEPT)

    async def run() -> list[dict[str, float]]:
        log, found = UsageLog(folder / "cache", "gemma-3-270m", send), list[dict[str, float]]()
        for _ in range(num_segments):
            requests = [make_request(number) for number in range(per_segment)]
            start = time.process_time()
            for request in requests:
                log.record(request)
            recorded = time.process_time() - start
            await log.send_all()
            stored = time.process_time() - start - recorded
            found.append({"recorded_us": 1e6 * recorded / per_segment, "stored_us": 1e6 * stored / per_segment})
        return found

    return asyncio.run(run())


def answer_ms() -> float:
    """Return how long a busy server on this kind of processor takes for one answer over HTTP."""
    own = processor_of(machine())
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / "http").glob("results*.json"))]
    [content] = [each for each in files if processor_of(each["machine"]) == own] or files[:1]
    return 1000 * NUM_NEW / statistics.median(run[HTTP_ONE] for run in content["runs"] if HTTP_AUTO in run)


def main(
    requests_s: Annotated[int, typer.Option(help="requests a second of the replica")] = 20,
    minutes: Annotated[int, typer.Option(help="traffic of this long; it is not waited for")] = 20,
    quick: Quick = False,
) -> None:
    """Measure events of requests with three adapters each."""
    num_segments = 3 if quick else int(minutes * 60 / SEND_EVERY_S)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), num_segments, int(requests_s * SEND_EVERY_S))
    figures = {name: sum(run[name] for run in found) / len(found) for name in found[0]}  # merges are in some only
    answer = answer_ms()
    figures |= {"answer_ms": answer, "share": sum(figures.values()) / 1000 / answer}
    table = table_of("", "time")
    table.add_row("an event: recorded, CPU", f"{figures['recorded_us']:.0f} µs")
    table.add_row("an event: sent, stored, merged, CPU", f"{figures['stored_us']:.0f} µs")
    table.add_row(f"a busy server's answer of {NUM_NEW} tokens over HTTP", f"{answer:.0f} ms")
    table.add_row("usage's share", f"{100 * figures['share']:.3f} %")
    text = shown(table)
    if not quick:
        write_results("usage_cost", figures=figures, table=text, runs=found, keeps_other_processors=True)


if __name__ == "__main__":
    typer.run(main)
