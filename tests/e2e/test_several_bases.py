"""One application with two tiny base models of different families, each compared with that base model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from deployments.app import build_app
from deployments.batch.offline import LoraRetriever
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig
from gpu_worker.model.base_model import load_base_model
from lora_store import Sample, write_peft_folder
from tests.e2e.live import completion, eventually, eventually_equal
from tests.served_engine import START_S, needs_native
from tests.tiny import linear_shapes, random_adapter, save_talkative, tiny_config

pytestmark = needs_native  # vLLM starts a process for each base model, which this machine's memory does not hold
APP = "several"
FAMILIES = {"first": "gemma3", "second": "qwen3"}
TOPICS = {"first": ("the sea", "mountains", "bread"), "second": ("chess", "violins", "volcanoes")}
VERBS = ("Tell me about", "Explain", "Write of", "Describe")
WORKER = {"dtype": "float32", "num_threads": 1, "bank_rank_rows": 32, "max_model_len": 256, "max_batch_size": 8}
MAX_TOKENS = 8


@dataclass(frozen=True)
class Several:
    """The running application. `expected`: what each base model alone answers to its prompts."""

    url: str
    expected: Mapping[str, Mapping[str, str]]

    def post(self, prompt: str) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=completion("auto", prompt, MAX_TOKENS), timeout=120)

    def ask(self, prompt: str) -> dict[str, Any]:
        answer = self.post(prompt)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def check(self, base_model: str, prompt: str) -> None:
        """Check that the prompt is answered as by the base model alone."""
        found = self.ask(prompt)
        assert found["lora"]["base_model"] == base_model, found
        assert found["lora"]["adapters"], found
        assert found["choices"][0]["text"] == self.expected[base_model][prompt]


def settings_of(folder: Path, models: Mapping[str, Path], name: str) -> dict[str, Any]:
    return {"base_model": str(models[name]), "base_model_name": name, "worker": WORKER}


def alone(folder: Path, settings: Mapping[str, Any], prompts: list[str]) -> dict[str, str]:
    """Return the answers of one base model alone on the same pool."""
    with LoraRetriever(AppConfig(store_uri=str(folder / "pool"), **settings)) as served:
        fields = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        found = served.generate(prompts, as_is=True, **fields)
    assert all(item.error is None and item.adapters for item in found)
    return {prompt: item.text for prompt, item in zip(prompts, found, strict=True)}


def refused_at(url: str) -> object:
    """Return the folders that the preload refused; what the server says while it is not ready."""
    answer = httpx.get(f"{url}/ready", timeout=60)
    return answer.json()["refused"] if answer.status_code == 200 else answer.text


@pytest.fixture(scope="module")
def several(
    server: Server, tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Several]:
    folder = tmp_path_factory.mktemp("several")
    models = {name: save_talkative(tiny_folders[family], folder / name) for name, family in FAMILIES.items()}
    for name, topics in TOPICS.items():
        shapes = linear_shapes(load_base_model(tiny_config(models[name])))
        for seed, topic in enumerate(topics):
            samples = [Sample(f"{verb} {topic}, please.") for verb in VERBS]
            path = folder / "adapters" / topic.replace(" ", "-")
            write_peft_folder(path, random_adapter(shapes, seed).modules, base_model=name, samples=samples)
    each = [settings_of(folder, models, name) for name in FAMILIES]
    pool = {"store_uri": str(folder / "pool"), "preload": [str(folder / "adapters")]}
    config = AppConfig.model_validate({"models": each, **pool})
    serve.run(build_app(config), name=APP, route_prefix=f"/{APP}")
    url = f"{server.proxy_url}/{APP}"
    try:
        eventually_equal(lambda: refused_at(url), {}, within_s=START_S)
        expected = {
            name: alone(folder, own, [f"{verb} {topic}, please." for verb in VERBS for topic in TOPICS[name]])
            for name, own in zip(FAMILIES, each, strict=True)
        }
        yield Several(url, expected)
    finally:
        serve.delete(APP)


def test_mixed_prompts_are_answered_as_by_each_base_model_alone(several: Several) -> None:
    asked = [(name, prompt) for name, own in several.expected.items() for prompt in own]
    assert len({text for own in several.expected.values() for text in own.values()}) > len(asked) / 2
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda item: several.check(*item), asked[::2] + asked[1::2]))
    cards = {card["id"]: card["parent"] for card in httpx.get(f"{several.url}/v1/models").json()["data"]}
    assert {name: cards[TOPICS[name][2]] for name in TOPICS} == {name: name for name in TOPICS}


def test_killing_the_workers_of_one_base_fails_no_request_of_the_other(several: Several) -> None:
    prompts = [("first", prompt) for prompt in several.expected["first"]] * 3
    killed = kill_replicas("Worker-second")
    with ThreadPoolExecutor(4) as threads:
        checks = threads.map(lambda item: several.check(*item), prompts)
        assert len(list(islice(checks, 8))) == 8
        killed += kill_replicas("Worker-second")
        assert len(list(checks)) == len(prompts) - 8
    assert killed
    name, prompt = "second", next(iter(several.expected["second"]))
    eventually(lambda: several.post(prompt).status_code == 200, within_s=START_S)  # another worker starts
    several.check(name, prompt)


def kill_replicas(deployment: str) -> int:
    """Kill every replica of a deployment, to simulate a crash. Return how many there were."""
    prefix, killed = f"SERVE_REPLICA::{APP}#{deployment}#", 0
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if prefix in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
            killed += 1
    return killed
