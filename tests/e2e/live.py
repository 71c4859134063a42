"""An application whose pool changes: a tiny model on two workers, two retrievers, the store on an S3 endpoint."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import ray
from pyarrow.fs import FileSelector
from ray import serve

from deployments.config.app import AppConfig
from lora_store import Sample, write_peft_folder
from lora_store.adapter import Shapes
from lora_store.location import Location
from tests.deployments.scripted import run as command
from tests.s3 import S3Endpoint
from tests.tiny import random_adapter

APP = "live"
BASE = "tiny"
SETTLE_S = 120.0
# Serve's own are 5 and 10 s, within which a proxy next to busy processes may not have answered yet.
PATIENT_PROXIES = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
CONTEXT = 8192  # tokens, so that answers may last seconds on fast processors too
Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Live:
    """The running application and its parts."""

    url: str
    config: AppConfig
    endpoint: S3Endpoint
    shapes: Shapes
    folders: Path

    @property
    def store_uri(self) -> str:
        return self.config.store_uri

    def folder(self, name: str, seed: int, topic: str) -> Path:
        return write_adapter(self.folders / str(seed) / name, self.shapes, seed, topic)

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=120, **request)

    def publish(self, folder: Path) -> dict[str, Any]:
        response = self.call("POST", "/v1/loras", json={"path": str(folder)})
        assert response.status_code == 201, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def publish_all(self, folders: Sequence[Path], **fields: Any) -> None:
        """Publish these folders in one commit, each with these fields."""
        adapters = [{"path": str(folder), **fields} for folder in folders]
        response = self.call("POST", "/v1/loras", json={"adapters": adapters})
        assert {row["status"] for row in response.json()["data"]} == {201}, response.text

    def withdraw_all(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(8) as threads:
            answers = threads.map(lambda name: self.call("DELETE", f"/v1/loras/{name}"), names)
        assert {answer.status_code for answer in answers} == {200}

    def upload(self, folder: Path) -> httpx.Response:
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        return self.call("POST", "/v1/loras", files=files, data={"name": folder.name})

    def ask(self, model: str, prompt: str = "The sea is", *, max_tokens: int = 24) -> httpx.Response:
        return self.call("POST", "/v1/completions", json=completion(model, prompt, max_tokens))

    def text(self, model: str, prompt: str = "The sea is", *, max_tokens: int = 24) -> str:
        response = self.ask(model, prompt, max_tokens=max_tokens)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def chosen(self, prompt: str) -> str:
        """Return the adapter nearest to the prompt."""
        plan = self.call("POST", "/v1/route", json={"prompt": prompt}).json()["data"][0]
        name: str = plan["candidates"][0]["name"]
        return name

    def on_all(self, deployment: str, method: str, *args: Any) -> list[Any]:
        return on_all(APP, deployment, method, *args)

    def stored(self, part: str) -> dict[str, int]:
        """Return the bytes of every object below a part of the store."""
        files, root = Location(self.store_uri).child(part).filesystem()
        infos = files.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
        return {info.path: info.size for info in infos if info.is_file}

    def overwrite(self, path: str, data: bytes) -> None:
        """Replace the bytes of an object, to simulate damage."""
        files, _ = Location(self.store_uri).filesystem()
        with files.open_output_stream(path) as stream:
            stream.write(data)


def write_adapter(path: Path, shapes: Shapes, seed: int, topic: str, *, base_model: str = BASE) -> Path:
    """Write a random adapter with sentences about `topic` as samples."""
    samples = [Sample(prompt) for prompt in prompts_about(topic)]
    write_peft_folder(path, random_adapter(shapes, seed).modules, base_model=base_model, samples=samples)
    return path


def prompts_about(topic: str) -> list[str]:
    return [f"{verb} {topic}, please." for verb in ("Tell me about", "Explain", "Write of", "Describe")]


def on_all(app: str, deployment: str, method: str, *args: Any) -> list[Any]:
    """Return the answers of all replicas of a deployment."""

    async def ask() -> list[Any]:
        handle = serve.get_deployment_handle(deployment, app)
        answers: list[Any] = await handle.broadcast(method, *args).results_async(timeout_s=120)
        return answers

    return asyncio.run(ask())


def running_and_waiting(app: str) -> int:
    """Return how many jobs the workers of an application have."""
    return sum(held.num_running + held.num_waiting for held in on_all(app, "Worker", "load"))


def kill_replicas(app: str, deployment: str) -> int:
    """Kill every replica of a deployment, to simulate a crash. Return how many there were."""
    prefix, killed = f"SERVE_REPLICA::{app}#{deployment}#", 0
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if prefix in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
            killed += 1
    return killed


def run(live: Live, *words: str, code: int = 0) -> str:
    """Run a command in this process, check its exit code, and return its output."""
    done = command(*words, "--url", live.url)
    assert done.exit_code == code, done.output
    return done.output


def completion(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready", timeout=120).status_code == 200
    return False


def processes_with(*starts: str) -> list[psutil.Process]:
    """Return the running processes below this one whose command begins so."""
    return [each for each in psutil.Process().children(recursive=True) if command_of(each).startswith(starts)]


def command_of(process: psutil.Process) -> str:
    """Return the command with its arguments, empty if the process has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def eventually(check: Callable[[], object], *, within_s: float = SETTLE_S) -> None:
    """Wait until `check` is true, for effects that are promised soon but not at once."""
    eventually_equal(lambda: bool(check()), True, within_s=within_s)


def settled(look: Callable[[], Seen], *, quiet_s: float = 3.0) -> Seen:
    """Return the result of `look` once it has not changed for `quiet_s`, after which background work is done."""
    seen, since = look(), time.monotonic()
    deadline = since + SETTLE_S
    while time.monotonic() - since < quiet_s:
        assert time.monotonic() < deadline, f"still changing: {seen}"
        time.sleep(0.1)
        if (now := look()) != seen:
            seen, since = now, time.monotonic()
    return seen


def eventually_equal(look: Callable[[], object], expected: object, *, within_s: float = SETTLE_S) -> None:
    """Wait until `look` returns the expected value."""
    deadline = time.monotonic() + within_s
    while (found := look()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == expected, f"{found} is not {expected}"


async def abandon(url: str, app: str, body: dict[str, Any], count: int) -> None:
    """Let this many clients send the request and disconnect once the workers have all of them, which end them."""
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        asking = [asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) for _ in range(count)]
        await asyncio.to_thread(eventually_equal, lambda: running_and_waiting(app), count)
        assert not any(task.done() for task in asking), "some were answered before they could leave"
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    await asyncio.to_thread(eventually_equal, lambda: running_and_waiting(app), 0)


async def stream_texts(
    live: Live, models: Sequence[str], max_tokens: int, *, started: asyncio.Event | None = None
) -> list[tuple[str, float]]:
    """Stream one completion per model, all at once: (text, end time). `started` is set at the last first token."""
    num_started = 0

    async def one(client: httpx.AsyncClient, model: str) -> tuple[str, float]:
        nonlocal num_started
        body = {**completion(model, "The sea is", max_tokens), "stream": True}
        parts: list[str] = []
        has_started = False
        async with client.stream("POST", f"{live.url}/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                parts += [choice["text"] for choice in event["choices"] if choice["text"]]
                if parts and not has_started:
                    has_started = True
                    num_started += 1
                    if started is not None and num_started == len(models):
                        started.set()
        return "".join(parts), time.monotonic()

    async with httpx.AsyncClient(timeout=120) as client:
        return list(await asyncio.gather(*[one(client, model) for model in models]))
