"""One real application for all end-to-end tests: real models, the starter pool, HTTP on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from deployments.config import AppConfig, WorkerSettings
from deployments.server import Server

EXAMPLES = Path(__file__).parents[2] / "examples"
POOL = EXAMPLES / "starter_pool"
READY_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Heldout:
    """One held-out prompt of a starter task."""

    task: str
    input: str
    output: str


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address. float32, so that rows of a batch can be compared with rows alone."""
    config = AppConfig(
        store_uri=str(tmp_path_factory.mktemp("pool")),
        preload=(POOL,),
        worker=WorkerSettings(dtype="float32", max_batch_size=16, max_model_len=1024),
    )
    with Server(config, port=0) as server:
        server.prepare(print)
        address = server.start()
        ready = server.wait_ready(timeout_s=READY_TIMEOUT_S)
        assert ready["num_adapters"] == len(list(POOL.glob("*/adapter_config.json")))
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def heldout() -> list[Heldout]:
    """Three held-out prompts of every task, tasks taken in turn."""
    tasks = sorted((EXAMPLES / "starter_heldout").glob("*.jsonl"))
    rows = [(path.stem, [json.loads(line) for line in path.read_text().splitlines()[:3]]) for path in tasks]
    return [Heldout(task, lines[turn]["input"], lines[turn]["output"]) for turn in range(3) for task, lines in rows]
