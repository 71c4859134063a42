"""One application with tiny base models of two families and engines, each compared with that base model alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from ray import serve
from transformers import Qwen3Config, Qwen3ForCausalLM

from deployments.app import build_app
from deployments.batch.offline import LoraRetriever
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig
from gpu_worker.model.base_model import load_base_model
from tests.e2e.live import (
    completion,
    eventually,
    eventually_equal,
    kill_replicas,
    prompts_about,
    settled,
    write_adapter,
)
from tests.served_engine import START_S, WORKER
from tests.soak import Scale
from tests.tiny import SHAPE, byte_tokenizer, linear_shapes, save_talkative, tiny_config

APP = "several"
MODELS = ("first", "second", "third")  # native, the engine of the run, and native without a worker while nobody asks
TOPICS = {"first": ("the sea", "mountains", "bread"), "second": ("chess", "violins", "volcanoes")}
TINY = {"dtype": "float32", "num_threads": 1, "bank_rank_rows": 32, "max_model_len": 256, "max_batch_size": 8}
MAX_TOKENS = 8
SLEEPY = {
    "min_replicas": 0,
    "initial_replicas": 0,
    "max_replicas": 1,
    "upscale_delay_s": 1,
    "downscale_delay_s": 1,
    "look_back_period_s": 2,
    "metrics_interval_s": 0.5,
}


@dataclass(frozen=True)
class Several:
    """The running application. `expected`: what each base model alone answers to its prompts."""

    url: str
    expected: Mapping[str, Mapping[str, str]]

    def post(self, prompt: str, model: str = "auto") -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=completion(model, prompt, MAX_TOKENS), timeout=START_S)

    def state(self, model: str) -> object:
        answer = httpx.get(f"{self.url}/ready", timeout=60)
        return answer.json()["models"][model] if answer.status_code == 200 else answer.text

    def check(self, base_model: str, prompt: str) -> None:
        """Check that the prompt is answered as by the base model alone."""
        answer = self.post(prompt)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["lora"]["base_model"] == base_model, found
        assert found["lora"]["adapters"], found
        assert found["choices"][0]["text"] == self.expected[base_model][prompt]


def settings_of(model: Path, name: str) -> dict[str, Any]:
    scaling: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.5}, "health_check_period_s": 1}
    return {
        "base_model": str(model),
        "base_model_name": name,
        "worker": TINY | (WORKER if name == "second" else {}),
        "worker_scaling": scaling | ({"autoscaling_config": SLEEPY} if name == "third" else {}),
    }


def save_wide_qwen3(folder: Path) -> Path:
    """Save a model with heads of 32 values: vLLM's attention supports no smaller ones on the CPU."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"hidden_size": 64}, head_dim=32))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


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
    sources = (tiny_folders["gemma3"], save_wide_qwen3(folder / "wide"), tiny_folders["gemma3"])
    models = {name: save_talkative(source, folder / name) for name, source in zip(MODELS, sources, strict=True)}
    for name, topics in TOPICS.items():
        shapes = linear_shapes(load_base_model(tiny_config(models[name])))
        for seed, topic in enumerate(topics):
            write_adapter(folder / "adapters" / topic.replace(" ", "-"), shapes, seed, topic, base_model=name)
    each = [settings_of(model, name) for name, model in models.items()]
    pool = {"store_uri": str(folder / "pool"), "preload": [str(folder / "adapters")]}
    waits = {"ingress_scaling": {"num_replicas": 2}, "scale_from_zero_timeout_s": START_S}
    config = AppConfig.model_validate({"models": each, **pool, **waits})
    serve.run(build_app(config), name=APP, route_prefix=f"/{APP}")
    url = f"{server.proxy_url}/{APP}"
    try:
        eventually_equal(lambda: refused_at(url), {}, within_s=START_S)
        expected = {
            name: alone(folder, own, [prompt for topic in TOPICS[name] for prompt in prompts_about(topic)])
            for name, own in zip(TOPICS, each, strict=False)
        }
        yield Several(url, expected)
    finally:
        serve.delete(APP, _blocking=False)  # its replicas end while other tests run


def test_mixed_prompts_are_answered_as_by_each_base_model_alone(several: Several, scale: Scale) -> None:
    asked = [(name, prompt) for name, own in several.expected.items() for prompt in own]
    assert len({text for own in several.expected.values() for text in own.values()}) > len(asked) / 2
    mixed = islice(cycle(asked[::2] + asked[1::2]), scale.pick("requests", small=len(asked), full=500))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda item: several.check(*item), mixed))
    cards = {card["id"]: card["parent"] for card in httpx.get(f"{several.url}/v1/models").json()["data"]}
    assert {name: cards[TOPICS[name][2]] for name in TOPICS} == {name: name for name in TOPICS}


def test_killing_the_workers_of_one_base_fails_no_request_of_the_other(several: Several) -> None:
    prompts = [("first", prompt) for prompt in several.expected["first"]] * 3
    killed = kill_replicas(APP, "Worker-second")
    with ThreadPoolExecutor(4) as threads:
        checks = threads.map(lambda item: several.check(*item), prompts)
        assert len(list(islice(checks, 8))) == 8
        killed += kill_replicas(APP, "Worker-second")
        assert len(list(checks)) == len(prompts) - 8
    assert killed
    name, prompt = "second", next(iter(several.expected["second"]))
    eventually(lambda: several.post(prompt).status_code == 200, within_s=START_S)  # another worker starts
    several.check(name, prompt)


def test_a_base_that_falls_asleep_and_wakes_fails_no_request_of_the_others(several: Several) -> None:
    eventually_equal(lambda: several.state("third"), "asleep", within_s=START_S)
    assert settled(lambda: several.state("third"), quiet_s=1.5) == "asleep", "asking for its state has woken it"
    asked = [(name, prompt) for name, own in several.expected.items() for prompt in own]
    with ThreadPoolExecutor(5) as threads:
        waking = threads.submit(several.post, "Hello", "third")
        list(threads.map(lambda item: several.check(*item), asked))
        assert waking.result().status_code == 200
    eventually_equal(lambda: several.state("third"), "asleep", within_s=START_S)
    several.check(*asked[0])


def test_a_changed_name_is_seen_by_each_request_from_one_moment_on(several: Several, scale: Scale) -> None:
    """Two Ingress replicas answer. Each answer has a policy that was in use at some time while it was made."""
    running = serve.status().applications[APP].deployments["Ingress"].replica_states
    assert sum(running.values()) == 2
    num_asked, name = scale.pick("requests", small=60, full=1000), f"{several.url}/v1/names/support"
    begun, ended, seen, is_over = [0], [0], list[int](), threading.Event()  # numbers of changes; by request, of those
    policy = {"model": "first", "max_tokens": 2}
    longer, shorter = (changed("PUT", name, policy | {"max_tokens": tokens})["digest"][:12] for tokens in (2, 1))
    policies = [shorter, longer, shorter]

    def ask() -> None:
        with httpx.Client(timeout=START_S) as client:
            while not is_over.is_set():
                before = ended[0]
                body = {"model": "support", "prompt": "Hello", "ignore_eos": True}  # samples may end
                answer = client.post(f"{several.url}/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                used = answer.headers["x-lora-policy"].partition("@")[2]
                assert used in policies[before : begun[0] + 1], (used, policies, before, begun)
                assert answer.json()["usage"]["completion_tokens"] == {shorter: 1, longer: 2}[used]
                seen.append(before)

    def wait_for_share(number: int) -> None:
        """Wait until a third of the requests began after this many changes, or a client failed."""
        done = [client.done for client in clients]
        eventually(lambda: seen.count(number) >= num_asked / 3 or any(is_done() for is_done in done), within_s=START_S)

    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(ask) for _ in range(8)]
        try:
            for number, request in enumerate([("PUT", name, policy), ("POST", name, {}, "/rollback")]):
                wait_for_share(number)
                begun[0] += 1
                changed(*request)
                ended[0] += 1
            wait_for_share(2)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    assert len(seen) >= num_asked


def changed(method: str, name: str, body: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Change a model name, and wait until the Retriever knows it."""
    answer = httpx.request(method, name + path, json=body, timeout=START_S)
    assert answer.status_code in (200, 202), answer.text
    found: dict[str, Any] = answer.json()
    reached = {"min_generation": found["generation"]}
    eventually(lambda: httpx.get(name, params=reached, timeout=60).status_code == 200, within_s=START_S)
    return found
