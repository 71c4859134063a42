"""Measure the time until a published adapter answers, and that of a thousand: `python -m benchmarks.publish`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.results_file import machine, write_results
from benchmarks.starter_pool import POOL
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig, RetrievalSettings

WEIGHTS, CONFIG, SAMPLES = "adapter_model.safetensors", "adapter_config.json", "lora_samples.jsonl"
_SUBJECTS = ("lighthouses", "beekeeping", "glaciers", "typewriters", "orchids", "trams", "comets", "violins")
_TTL_S = 600
console = Console(width=100)
Engine = Literal["native", "vllm"]


def variant(target: Path, number: int, *, known_texts: bool = False) -> str:
    """Write a new adapter of a starter adapter's size with 20 samples. Return a prompt that retrieves it.

    `known_texts`: use the starter adapter's samples, which the encoder has embedded before.
    """
    sources = sorted(path.parent for path in POOL.glob(f"*/{CONFIG}"))
    source = sources[number % len(sources)]
    target.mkdir(parents=True)
    (target / CONFIG).write_bytes((source / CONFIG).read_bytes())
    random = torch.Generator().manual_seed(number)
    tensors = load_file(source / WEIGHTS)
    for key, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=random) * 0.01 * tensor.float().std()
        tensors[key] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, target / WEIGHTS)
    inputs = [json.loads(line)["input"] for line in (source / SAMPLES).read_text().splitlines()[:20]]
    subject = f"{_SUBJECTS[number % len(_SUBJECTS)]} no. {number}"
    texts = inputs if known_texts else [f"About {subject}, {place}: {text}" for place, text in enumerate(inputs)]
    lines = [json.dumps({"input": text, "output": f"{number}"}) for text in texts]
    (target / SAMPLES).write_text("\n".join(lines))
    return f"About {subject}, {len(texts)}: {inputs[0]}"


def publish_and_ask(url: str, folder: Path, prompt: str, *, is_unlisted: bool = False) -> tuple[float, float]:
    """Return (seconds until published, seconds until the adapter has answered): an unlisted one by its name."""
    fields = {"name": folder.name, **({"ttl_s": str(_TTL_S)} if is_unlisted else {})}
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    started = time.perf_counter()
    published = httpx.post(f"{url}/v1/loras", files=files, data=fields, timeout=120)
    published_s = time.perf_counter() - started
    if published.status_code != 201:
        raise SystemExit(f"not published: {published.status_code} {published.text}")
    model, messages = folder.name if is_unlisted else "auto", [{"role": "user", "content": prompt}]
    body = {"model": model, "max_tokens": 8, "temperature": 0, "messages": messages}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
    answered_s = time.perf_counter() - started
    names = [adapter["name"] for adapter in answer["lora"]["adapters"]]
    if folder.name not in names:
        raise SystemExit(f"{folder.name} did not answer: {names}")
    return published_s, answered_s


def publish_all(url: str, folder: Path) -> float:
    """Return the seconds of one `loraretriever publish` of every adapter in `folder`."""
    command = [str(Path(sys.executable).with_name("loraretriever")), "publish", str(folder), "--url", url]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def config_of(folder: Path, projection: str = "auto", engine: Engine = "native") -> AppConfig:
    """Return the settings of two retrievers and two workers. `projection`: that of `retrieval.projection`."""
    return AppConfig(
        store_uri=str(folder / "pool"),
        preload=(POOL,),
        worker={"num_threads": 1, "engine": engine, "step_timeout_s": 300},
        retrieval=RetrievalSettings.model_validate({"projection": projection}),
        retriever_scaling={"num_replicas": 2},
        worker_scaling={"num_replicas": 2},
    )


def publish_singles(
    folder: Path, rounds: int, projection: str = "auto", engine: Engine = "native", *, is_unlisted: bool = False
) -> list[tuple[float, float]]:
    """Return the times of single publishes alone, each followed by a request."""
    prompts = [variant(folder / "single" / f"single-{n}", n) for n in range(rounds + 1)]
    with Server(config_of(folder, projection, engine), port=0) as server:
        server.prepare(console.print)
        url = server.start()
        server.wait_ready(timeout_s=600)
        asked = [
            publish_and_ask(url, folder / "single" / f"single-{n}", prompt, is_unlisted=is_unlisted)
            for n, prompt in enumerate(prompts)
        ]
    return asked[1:]  # the first is a warm-up


def measure(folder: Path, rounds: int, adapters: int) -> tuple[list[tuple[float, float]], float, float]:
    """Return (single publishes, seconds of the bulk publish with new texts, and with texts the encoder knows)."""
    config = config_of(folder)
    prompts = [variant(folder / "single" / f"single-{n}", n) for n in range(rounds + 1)]
    for number in range(adapters):
        variant(folder / "new" / f"new-{number}", 10_000 + number)
        variant(folder / "known" / f"known-{number}", 20_000 + number, known_texts=True)
    with Server(config, port=0) as server:
        server.prepare(console.print)
        url = server.start()
        server.wait_ready(timeout_s=600)
        asked = [publish_and_ask(url, folder / "single" / f"single-{n}", prompt) for n, prompt in enumerate(prompts)]
        return asked[1:], publish_all(url, folder / "new"), publish_all(url, folder / "known")  # the first is a warm-up


def _table(singles: list[tuple[float, float]]) -> Table:
    """Return a table of the times of single publishes."""
    table = Table(title=machine(), title_justify="left")
    for column in ("what", "count", "p50 s", "max s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, seconds in zip(("upload until 201", "upload until it answers"), zip(*singles, strict=True), strict=True):
        table.add_row(what, str(len(singles)), f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}")
    return table


def main(
    rounds: Annotated[int, typer.Option(help="single publishes, each followed by a request")] = 30,
    adapters: Annotated[int, typer.Option(help="adapters in one command; none with vllm or --unlisted")] = 1000,
    engine: Annotated[Engine, typer.Option(help="the workers' engine")] = "native",
    unlisted: Annotated[bool, typer.Option("--unlisted", help="publish with a time to live, ask by name")] = False,
) -> None:
    """Measure 2 retrievers and 2 workers with Gemma-3-270M; adapters of 1.4 MB with 20 samples each."""
    new_s = known_s = 0.0
    kinds = [kind for kind, is_wanted in (("vllm", engine == "vllm"), ("unlisted", unlisted)) if is_wanted]
    with tempfile.TemporaryDirectory() as name:
        if kinds:
            singles = publish_singles(Path(name), rounds, engine=engine, is_unlisted=unlisted)
            adapters = 0
        else:
            singles, new_s, known_s = measure(Path(name), rounds, adapters)
    table = _table(singles)
    if adapters:
        table.add_row("one command, new texts", str(adapters), f"{new_s:.0f}", "")
        table.add_row("one command, texts the encoder knows", str(adapters), f"{known_s:.0f}", "")
    with console.capture() as captured:
        console.print(table)
    console.print(table)
    answered_p50 = statistics.median(answered for _, answered in singles)
    runs = [{"published_s": p, "answered_s": a} for p, a in singles]
    if kind := "_".join(kinds):
        results = {f"{kind}_publish_to_answer_p50_s": answered_p50}
        write_results(f"publish_{kind}", figures=results, table=captured.get(), runs=runs)
        return
    if adapters != 1000:
        console.print("not written: the results file is for 1,000 adapters")
        return
    figures = {
        "publish_to_answer_p50_s": answered_p50,
        "publish_1000_s": new_s,
        "publish_1000_without_encoder_s": known_s,
    }
    write_results("publish", figures=figures, table=captured.get(), runs=runs)


if __name__ == "__main__":
    typer.run(main)
