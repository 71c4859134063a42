"""Check and measure both engines on a GPU within nine minutes, without network: `make gpu`.

First the Triton kernels are checked and timed without an engine, and both engines answer a part of the conformance
suite with Gemma-3-270M. Then a random model of Llama-3.1-8B's shape is measured: the base model, one adapter a row, and
mixtures of 3, over 8, 32 and 128 adapters, in batches of 1 to 128 rows, next to the rate that the device's memory
allows. Each part runs in a process of its own, with a share of the time; a part whose package is missing is left out.
With `--toy` all of it runs on the CPU with a tiny model, within a minute.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.models import LLAMA_8B, TOY, save_random
from benchmarks.results_file import machine, write_results
from gpu_worker.config import PACKAGED_MODEL
from lora_store.location import DEFAULT_CACHE_DIR

SHARES = {
    ("kernels", "triton"): 0.1,
    ("checks", "native"): 0.1,
    ("checks", "vllm"): 0.2,
    ("speed", "vllm"): 0.35,
    ("speed", "native"): 0.25,
}
"""Each run's share of the time, in order. A run leaves to the later ones what it does not use."""
console = Console(width=130)


def run_all(engines: Sequence[str], models: Mapping[str, str], device: str, seconds: float) -> list[dict[str, Any]]:
    """Run each engine's checks and measurements. A run that fails or exceeds its share leaves a line that says so."""
    rows: list[dict[str, Any]] = []
    ends_at = time.monotonic() + seconds
    for (what, engine), share in SHARES.items():
        if engine not in engines:
            continue
        left = ends_at - time.monotonic()
        rest = sum(s for (w, e), s in list(SHARES.items())[list(SHARES).index((what, engine)) :] if e in engines)
        rows += run_one(engine, what, models.get(what, ""), device, left * share / rest)
    return rows


def run_one(engine: str, what: str, model: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """Return the lines that the run has written."""
    console.print(f"{what} of the {engine} engine, at most {seconds:.0f} s", style="bold")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.jsonl")
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.engine_run",
            "--engine",
            engine,
            "--what",
            what,
            "--model",
            model,
        ]
        command += ["--device", device, "--seconds", str(seconds * 0.8), "--out", str(out)]
        end = "ended"
        process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, start_new_session=True)
        try:
            if process.wait(seconds):
                end = f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            end = "was cut off"
        finally:  # its own processes too, which hold the device's memory
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return [*found, {"engine": engine, "kind": what, "what": "end", "end": end}]


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the results by name."""
    figures: dict[str, float] = {}
    for engine in ("triton", "native", "vllm"):
        checks = [row["passed"] for row in rows if row["engine"] == engine and row["what"] == "check"]
        figures[f"gpu_{engine}_checks_passed"] = sum(checks)
        figures[f"gpu_{engine}_checks_failed"] = len(checks) - sum(checks)
    for row in rows:
        if "decode_tokens_per_s" in row:
            name = f"gpu_{row['engine']}_{row['what'].replace(' ', '_')}"
            figures[name] = row["decode_tokens_per_s"]
            figures[f"{name}_of_floor"] = row["decode_tokens_per_s"] / row["floor_tokens_per_s"]
        if "tiles_us" in row:
            name = row["what"].removeprefix("products of ").replace(" ", "_")
            figures |= {f"gpu_{name}_{kind}": row[kind] for kind in ("tiles_us", "dense_us", "linears_us", "floor_us")}
        if row["what"] == "first token":
            figures |= {f"gpu_{row['engine']}_first_token_{kind}_s": row[f"{kind}_s"] for kind in ("hot", "cold")}
    return figures


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    table = Table(title=machine(), title_justify="left")
    for column in ("engine", "what", "decode tokens/s", "of the floor", "tokens/s with prompts", "prompts s"):
        table.add_column(column, justify="left" if column in ("engine", "what") else "right")
    lines = []
    for row in rows:
        if "decode_tokens_per_s" in row:
            share = row["decode_tokens_per_s"] / row["floor_tokens_per_s"]
            speeds = (f"{row['decode_tokens_per_s']:.0f}", f"{share:.2f}", f"{row['tokens_per_s']:.0f}")
            table.add_row(row["engine"], row["what"], *speeds, f"{row['prompts_s']:.3f}")
        else:
            lines.append(
                "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            )
    with console.capture() as captured:
        console.print(table)
    text = captured.get() + "\n".join(lines) + "\n"
    console.print(text, markup=False)
    return text


app = typer.Typer(add_completion=False)


@app.command()
def main(
    toy: Annotated[bool, typer.Option(help="on the CPU, with a tiny model")] = False,
    minutes: Annotated[float, typer.Option(help="the time for everything")] = 8.5,
    out: Annotated[Path | None, typer.Option(help="write the lines to this file in place of the results")] = None,
) -> None:
    """Check and measure the engines that are installed."""
    started = time.monotonic()
    if not toy and not torch.cuda.is_available():
        raise SystemExit("no GPU was found; --toy runs on the CPU")
    device = "cpu" if toy else "cuda"
    engines = ["native", *[package for package in ("triton", "vllm") if importlib.util.find_spec(package)]]
    with tempfile.TemporaryDirectory() as folder:
        if toy:
            model = str(save_random(Path(folder, "toy"), TOY, torch.float32, device))
            models = {"checks": model, "speed": model}
        else:
            folder_8b = DEFAULT_CACHE_DIR / "gpu" / "llama-8b-shape"
            # A process of its own draws the model, so that this one takes no memory of the GPU.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
                random = other.submit(save_random, folder_8b, LLAMA_8B, torch.bfloat16, device).result()
            models = {"checks": PACKAGED_MODEL, "speed": str(random)}
        rows = run_all(engines, models, device, 60 * minutes - (time.monotonic() - started))
    text = report(rows)
    if out is not None:
        out.write_text(json.dumps({"machine": machine(), "figures": figures_of(rows), "rows": rows}, indent=1))
    elif not toy:
        write_results("gpu", figures=figures_of(rows), table=text, runs=rows)
    if any(row.get("passed") is False or row.get("end", "ended") != "ended" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
