"""Check or measure one engine in a process of its own; `python -m benchmarks.gpu` starts it.

It appends to a file of JSON lines as it goes on, so that a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.gpu.checks import run_checks
from benchmarks.gpu.hosting import Hosted
from benchmarks.gpu.models import LLAMA_8B, TOY, layer_shapes
from benchmarks.gpu.speed import FULL, SMALL, floor_of, run_speed, shown
from gpu_worker.config import PACKAGED_MODEL, NativeWorkerConfig, VllmWorkerConfig, configure_worker
from gpu_worker.model.base_model import model_source, resolve_dtype
from gpu_worker.vllm.front_model import load_front_model

What = Literal["checks", "speed", "kernels"]
Write = Callable[[dict[str, Any]], None]


def writing(out: Path, engine: str, what: What) -> Write:
    """Return a function that appends a row to the file and prints it."""

    def write(row: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps({"engine": engine, "kind": what} | row) + "\n")
        print(shown(row), flush=True)

    return write


def run_kernels(device: str, write: Write) -> None:
    """Write a line for each check of the Triton kernels, and for each measurement."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the import
    from benchmarks.gpu import kernels

    for check in kernels.run_checks(torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32):
        write({"what": "check"} | check)
    shape, layers, sizes = (LLAMA_8B, 4, FULL) if device == "cuda" else (TOY, 1, SMALL)
    for row in kernels.run_speed(torch.device(device), layer_shapes(shape), layers, sizes):
        write(row)


async def run(config: NativeWorkerConfig | VllmWorkerConfig, what: What, seconds: float, write: Write) -> None:
    """Start the engine, and write a line for its start and for each result."""
    ends_at = time.monotonic() + seconds
    facts = {name: getattr(config, name) for name in ("base_model", "device", "dtype")}
    front = load_front_model(VllmWorkerConfig(**facts))  # it reads files only, whichever engine runs
    hosted = Hosted(config)
    started = time.monotonic()
    await hosted.start()
    write({"what": "start", "start_s": time.monotonic() - started})
    try:
        if what == "checks":
            async for check in run_checks(hosted, front.dtype):
                write({"what": "check"} | check)
            return
        sizes = FULL if config.device == "cuda" else SMALL
        floor = floor_of(
            hosted, config.device, weight_bytes(Path(model_source(config))), front.kv_token_bytes, sizes.rank
        )
        write({"what": "bandwidth", "bytes_per_s": floor.bytes_per_s, "device": _device(config.device)})
        async for row in run_speed(hosted, sizes, floor, ends_at):
            write(row)
    finally:
        hosted.engine.stop()


def settings_of(engine: str, what: What, model: str, device: str) -> NativeWorkerConfig | VllmWorkerConfig:
    sizes = FULL if device == "cuda" else SMALL
    is_check = what == "checks"
    return configure_worker(
        engine=engine,  # type: ignore[arg-type]
        base_model=model,
        device=device,
        dtype="auto" if device == "cuda" else "float32",
        bank_rank_rows=32 if is_check else sizes.rank * max(sizes.active),
        max_batch_size=8 if is_check else max(8, *sizes.batches),  # few rows have few graphs to capture
        max_model_len=512,
        max_step_tokens=4096 if device == "cuda" else 64,
        host_cache_bytes=16 << 30,
    )


def weight_bytes(folder: Path) -> int:
    """Return the bytes of weights that a step reads: all of the model but an embedding that is not its head too."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        sizes |= {name: end - begin for name, (begin, end) in tensors.items()}
    if "lm_head.weight" in sizes:
        sizes.pop("model.embed_tokens.weight")
    return sum(sizes.values())


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main(
    engine: Annotated[str, typer.Option(help="native or vllm; triton for the kernels alone")],
    out: Annotated[Path, typer.Option(help="file of JSON lines to append to")],
    what: Annotated[str, typer.Option(help="checks, speed or kernels")] = "speed",
    model: Annotated[str, typer.Option(help="folder or name of the base model")] = PACKAGED_MODEL,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    seconds: Annotated[float, typer.Option(help="start no measurement after this time")] = 150,
) -> None:
    """Check or measure one engine, or the kernels."""
    assert what in ("checks", "speed", "kernels")
    resolve_dtype("auto", device)
    write = writing(out, engine, what)  # type: ignore[arg-type]
    if what == "kernels":
        run_kernels(device, write)
    else:
        asyncio.run(run(settings_of(engine, what, model, device), what, seconds, write))  # type: ignore[arg-type]


if __name__ == "__main__":  # vLLM starts processes that import this file again
    typer.run(main)
