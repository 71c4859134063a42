"""Check or measure one engine in a process of its own; `python -m benchmarks.gpu` starts it.

It appends to a file of JSON lines as it goes on, so that a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.gpu.checks import run_checks
from benchmarks.gpu.hosting import Hosted
from benchmarks.gpu.speed import FULL, SMALL, floor_of, run_speed, shown
from gpu_worker.config import PACKAGED_MODEL, WorkerConfig
from gpu_worker.model.base_model import model_source, resolve_dtype
from gpu_worker.vllm.front_model import load_front_model

What = Literal["checks", "speed"]


async def run(config: WorkerConfig, what: What, seconds: float, out: Path) -> None:
    """Start the engine, and write a line for its start and for each result."""

    def write(row: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps({"engine": config.engine, "kind": what} | row) + "\n")
        print(shown(row), flush=True)

    ends_at = time.monotonic() + seconds
    front = load_front_model(config)
    hosted = Hosted(config)
    started = time.monotonic()
    hosted.start()
    write({"what": "start", "start_s": time.monotonic() - started, "memory": hosted.engine.memory.summary})
    try:
        if what == "checks":
            async for check in run_checks(hosted, front.dtype):
                write({"what": "check"} | check)
            return
        sizes = FULL if config.device == "cuda" else SMALL
        weight_bytes = sum(path.stat().st_size for path in Path(model_source(config)).glob("*.safetensors"))
        floor = floor_of(hosted, config.device, weight_bytes, front.kv_token_bytes, sizes.rank)
        write({"what": "bandwidth", "bytes_per_s": floor.bytes_per_s, "device": _device(config.device)})
        async for row in run_speed(hosted, sizes, floor, ends_at):
            write(row)
    finally:
        hosted.engine.stop()


def settings_of(engine: str, what: What, model: str, device: str) -> WorkerConfig:
    sizes = FULL if device == "cuda" else SMALL
    ranks = 32 if what == "checks" else sizes.rank * max(sizes.active)
    return WorkerConfig(
        engine=engine,  # type: ignore[arg-type]
        base_model=model,
        device=device,  # type: ignore[arg-type]
        dtype="auto" if device == "cuda" else "float32",
        bank_rank_rows=ranks,
        max_batch_size=max(8, *sizes.batches),
        max_model_len=512,
        max_step_tokens=4096 if device == "cuda" else 64,
        host_cache_bytes=16 << 30,
    )


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main(
    engine: Annotated[str, typer.Option(help="native or vllm")],
    out: Annotated[Path, typer.Option(help="file of JSON lines to append to")],
    what: Annotated[str, typer.Option(help="checks or speed")] = "speed",
    model: Annotated[str, typer.Option(help="folder or name of the base model")] = PACKAGED_MODEL,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    seconds: Annotated[float, typer.Option(help="start no measurement after this time")] = 150,
) -> None:
    """Check or measure one engine."""
    assert what in ("checks", "speed")
    resolve_dtype("auto", device)
    asyncio.run(run(settings_of(engine, what, model, device), what, seconds, out))  # type: ignore[arg-type]


if __name__ == "__main__":  # vLLM starts processes that import this file again
    typer.run(main)
