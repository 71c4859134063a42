"""A separate server whose workers scale, load for it, and observations from outside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from deployments.cli.client import free_port
from tests.cluster.machines import Machines, own_ray
from tests.e2e.live import SETTLE_S, eventually, eventually_equal, is_ready
from tests.served_engine import HEAD_DIM, START_S, WORKER
from tests.tiny import VOCABULARY, byte_tokenizer

BASE = "tiny"
CONTEXT = 65_536
NUM_ASCII = 94  # the byte tokenizer's first ids, one letter each
TARGET_REQUESTS = 8  # per worker
NUM_STREAMS = TARGET_REQUESTS - 1  # one worker is enough for these
STREAM_S = 12.0  # longer than the removal of a worker takes


def long_model(folder: Path) -> Path:
    """Save a tiny model with a long context, so that answers take seconds. Each token is a letter, released at once."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        sliding_window=64,
        layer_types=["sliding_attention"] * 2,  # so that the last token costs no more than the first
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.2,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[NUM_ASCII:] = (
            0  # tied to the head, so that their logits are never the largest
        )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def settings_of(folder: Path, *, min_workers: int, max_workers: int) -> dict[str, Any]:
    """Return settings under which workers are added and removed within seconds."""
    scaling = {
        "autoscaling_config": {
            "min_replicas": min_workers,
            "max_replicas": max_workers,
            "target_ongoing_requests": TARGET_REQUESTS,
            "upscale_delay_s": 1,
            "downscale_delay_s": 1,
            "look_back_period_s": 2,
            "metrics_interval_s": 0.5,
        },
        "ray_actor_options": {"num_cpus": 1},
        "max_ongoing_requests": 2112,
    }
    return {
        "base_model": str(long_model(folder / "model")),
        "base_model_name": BASE,
        "store_uri": str(folder / "pool"),
        "max_new_tokens": CONTEXT,
        "worker": {"num_threads": 1, "max_model_len": CONTEXT, "max_batch_size": 16, "bank_rank_rows": 32} | WORKER,
        "worker_scaling": scaling,
    }


@contextmanager
def served(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the address of `loraretriever serve` in its own process with its own Ray."""
    with serving(folder, settings, os.environ) as (url, _):
        yield url


@contextmanager
def serving(
    folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str], *, leads_group: bool = False
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `loraretriever serve` with this environment until it is ready. Yield its address and its process.

    `leads_group`: the process leads a session and a process group of its own, which its children share.
    """
    file, port = folder / "settings.yaml", free_port("127.0.0.1")
    file.write_text(yaml.safe_dump(dict(settings)))
    program = Path(sys.executable).with_name("loraretriever")
    command = [str(program), "serve", "--config", str(file), "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=leads_group
        )
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: server.poll() is not None or is_ready(url), within_s=START_S)
        assert server.poll() is None, (folder / "server.log").read_text()
        yield url, server
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        finally:
            server.kill()


@contextmanager
def on_machines(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the address of the application on several nodes, with these settings over its YAML file."""
    scaling = settings["worker_scaling"] | {"ray_actor_options": {"num_cpus": 0, "resources": {"accelerator": 1}}}
    machines = Machines({**settings, "worker_scaling": scaling, "preload": []}, folder)
    with own_ray():
        machines.start()
        try:
            yield machines.url
        finally:
            machines.stop()


def worker_replicas(url: str) -> dict[str, int]:
    """Return the number of workers that accept requests, and of those that did not answer a call."""
    found: dict[str, int] = httpx.get(f"{url}/v1/stats", timeout=120).json()["workers"]["replicas"]
    return found


def num_workers(url: str) -> int:
    """Return the number of workers that accept requests, without those that are being removed."""
    return worker_replicas(url)["answered"]


async def until_workers(url: str, count: int, *, within_s: float = SETTLE_S) -> float:
    """Return the seconds until this many workers accept requests."""
    began = time.monotonic()
    await asyncio.to_thread(eventually_equal, lambda: num_workers(url), count, within_s=within_s)
    return time.monotonic() - began


def completion(max_tokens: int, **changes: Any) -> dict[str, Any]:
    body = {"model": BASE, "prompt": "The sea is", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return body | {"max_repeats": 0} | changes  # the settings of `make serve` would end an answer that repeats


async def asking(client: httpx.AsyncClient, statuses: list[int], stop: asyncio.Event) -> None:
    """Run one client that sends the next request once it has an answer. Shorter ones would leave pauses between."""
    while not stop.is_set():
        response = await client.post("/v1/completions", json=completion(512))
        statuses.append(response.status_code)


async def streaming(client: httpx.AsyncClient, max_tokens: int, started: asyncio.Event) -> tuple[int, str]:
    """Return (tokens, finish reason) of a stream read until `[DONE]`."""
    body = completion(max_tokens, stream=True, stream_options={"include_usage": True})
    reason, tokens, last = "", 0, ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            last = line.removeprefix("data: ") or last
            if not line.startswith("data: {"):
                continue
            started.set()
            event = json.loads(last)
            assert "error" not in event, event
            tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
            reason = next((c["finish_reason"] for c in event["choices"] if c["finish_reason"]), reason)
    assert last == "[DONE]"
    return tokens, reason


async def tokens_in(client: httpx.AsyncClient, seconds: float) -> int:
    """Return how many tokens a stream has in this time if it is alone, at most what fits the context."""
    count, began = 1000, time.monotonic()
    await streaming(client, count, asyncio.Event())
    return min(CONTEXT - 100, int(count * seconds / (time.monotonic() - began)))


@dataclass
class Course:
    """The course of a load: seconds until the most workers ran, and afterwards until one was left."""

    up_s: float
    down_s: float
    statuses: list[int]
    ends: list[tuple[int, str]]
    num_left_behind: int  # streams still running when all workers but one accepted no more requests
    num_tokens: int  # of each stream


async def rise_and_fall(url: str, *, most: int, high_s: float) -> Course:
    """Send load until `most` workers run and for `high_s` longer; then only streams, for which one worker suffices."""
    stop, statuses = asyncio.Event(), list[int]()
    async with httpx.AsyncClient(base_url=url, timeout=180, limits=httpx.Limits(max_connections=200)) as client:
        num_tokens = await tokens_in(client, STREAM_S)  # beside the load it would be too few for the time after it
        num_clients = most * TARGET_REQUESTS - 2
        clients = [asyncio.create_task(asking(client, statuses, stop)) for _ in range(num_clients)]
        up_s = await until_workers(url, most, within_s=START_S)
        await asyncio.wait(clients, timeout=high_s)
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streamed = [asyncio.create_task(streaming(client, num_tokens, event)) for event in begun]
        await asyncio.gather(*[event.wait() for event in begun])
        stop.set()
        await asyncio.gather(*clients)
        down_s = await until_workers(url, 1)
        num_left_behind = sum(not task.done() for task in streamed)
        return Course(up_s, down_s, statuses, await asyncio.gather(*streamed), num_left_behind, num_tokens)
