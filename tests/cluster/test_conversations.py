"""Conversations on four real workers behind Serve's proxy and two Ingresses, next to what `benchmarks.fleet` predicts.

Three base models take turns within one run: four workers with this server's router, four with Serve's own, and one.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks.engine_cases import shown, table_of
from benchmarks.fleet import Fleet, Simulation
from benchmarks.results_file import write_part
from gpu_worker.model.base_model import load_base_model
from lora_store import write_peft_folder
from tests.cluster.scaling_app import long_model, served
from tests.e2e.live import eventually
from tests.served_engine import START_S, WORKER
from tests.soak import Scale
from tests.tiny import linear_shapes, random_adapter, tiny_config

SERVES_ROUTER = {"request_router_class": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"}
FLEETS: dict[str, dict[str, Any]] = {
    "affine": {"num_replicas": 4},
    "plain": {"num_replicas": 4, "request_router_config": SERVES_ROUTER},
    "one": {"num_replicas": 1},
}
RANK, BANK = 4, 4  # each adapter has this rank, and this many fit a worker
NUM_ADAPTERS, ROUTERS = 12, 2
FIRST, MESSAGE, ANSWER = 900, 60, 24  # tokens, which are bytes
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
TURNS, CLIENTS = 6, 8
POPULARITY = [1 / (number + 1) for number in range(NUM_ADAPTERS)]


@dataclass
class Found:
    """Counts of one fleet: tokens of earlier turns, those found in the prefix cache, turns and seconds."""

    earlier: int = 0
    found: int = 0
    turns: int = 0
    seconds: float = 0.0

    @property
    def hits(self) -> float:
        return self.found / self.earlier


def settings_of(folder: Path) -> dict[str, Any]:
    (folder / "template.jinja").write_text(TEMPLATE)
    models = []
    for name, scaling in FLEETS.items():
        model = long_model(folder / name)
        shapes = linear_shapes(load_base_model(tiny_config(model)))
        for seed in range(NUM_ADAPTERS):
            adapter = random_adapter(shapes, seed, rank=RANK)
            write_peft_folder(folder / "adapters" / f"{name}-{seed}", adapter.modules, base_model=name)
        worker = {"num_threads": 1, "max_model_len": 4096, "max_batch_size": 8, "bank_rank_rows": RANK * BANK}
        models.append(
            {
                "base_model": str(model),
                "base_model_name": name,
                "template": "chat",
                "chat_template": str(folder / "template.jinja"),
                "worker": worker | {"dtype": "float32"} | WORKER,
                "worker_scaling": scaling | {"ray_actor_options": {"num_cpus": 0.1}},
            }
        )
    ingress = {"num_replicas": ROUTERS}
    pool = {"store_uri": str(folder / "pool"), "preload": [str(folder / "adapters")]}
    return {"models": models, "ingress_scaling": ingress, "max_new_tokens": 256, **pool}


def letters(count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=count))


async def talk(client: httpx.AsyncClient, model: str, seed: int, turns: int, found: Found) -> None:
    """Hold one conversation, and count what its later turns find."""
    messages, earlier = [{"role": "user", "content": letters(FIRST, seed)}], 0
    for turn in range(turns):
        body = {"model": model, "messages": messages, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        found.earlier += earlier
        found.found += min(earlier, usage["prompt_tokens_details"]["cached_tokens"])
        found.turns += 1
        earlier = usage["total_tokens"]
        reply = answer.json()["choices"][0]["message"]["content"]
        messages += [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": letters(MESSAGE, seed + turn)},
        ]


async def converse(url: str, name: str, seeds: Sequence[int], found: Found) -> None:
    """Hold these conversations, CLIENTS at a time."""
    left = iter(seeds)

    async def client_of() -> None:
        # Serve's proxy gives each turn to any Ingress.
        async with httpx.AsyncClient(base_url=url, timeout=START_S) as client:
            for seed in left:
                [adapter] = random.Random(seed).choices(range(NUM_ADAPTERS), POPULARITY)
                await talk(client, f"{name}-{adapter}", seed, TURNS, found)

    started = time.perf_counter()
    await asyncio.gather(*[client_of() for _ in range(CLIENTS)])
    found.seconds += time.perf_counter() - started


async def costs(url: str) -> tuple[float, float]:
    """Return the seconds of a turn whose prompt is cached, and those of each token that is not: on the one worker."""
    times: dict[bool, list[float]] = {False: [], True: []}
    async with httpx.AsyncClient(base_url=url, timeout=START_S) as client:
        for seed, is_cached in itertools.product(range(10**6, 10**6 + 8), (False, True)):
            started = time.perf_counter()
            await talk(client, "one", seed, 1, Found())
            times[is_cached].append(time.perf_counter() - started)
    cached, new = (sorted(times[is_cached])[4] for is_cached in (True, False))
    return cached, max(0.0, new - cached) / FIRST


def misses(url: str, name: str) -> float:
    """Return the share of adapters that were not in the bank of the worker that got the request."""
    found = httpx.get(f"{url}/v1/stats", timeout=START_S).json()["models"][name]
    loads = found["host_hits"] + found["fetches"]
    return float(loads / (loads + found["bank_hits"]))


def test_conversations_find_their_prefixes_as_the_simulation_predicts(scale: Scale, tmp_path: Path) -> None:
    if not scale.is_full:
        pytest.skip("it starts nine workers")
    num_talks = scale.pick("conversations of each fleet", small=8, full=32)
    torch.set_num_threads(1)
    found = {name: Found() for name in FLEETS}
    with served(tmp_path, settings_of(tmp_path)) as url:
        eventually(lambda: len(httpx.get(f"{url}/v1/models").json()["data"]) > 3 * NUM_ADAPTERS, within_s=START_S)
        turn_s, token_s = asyncio.run(costs(url))
        for start in range(0, num_talks, num_talks // 2):
            seeds = [1000 * seed for seed in range(start, start + num_talks // 2)]
            for name, own in found.items():
                asyncio.run(converse(url, name, seeds, own))
        missed = {name: misses(url, name) for name in FLEETS}
    fleet = Fleet(workers=4, routers=ROUTERS, adapters=NUM_ADAPTERS, k=1, bank=BANK, clients=CLIENTS, turns=TURNS)
    fleet = replace(fleet, first_tokens=FIRST, turn_tokens=MESSAGE + ANSWER + 20, read_s=0.0)
    fleet = replace(fleet, turn_s=turn_s, token_s=token_s, load_s=0.0, talks=1000)
    fleets = {"affine": fleet, "plain": replace(fleet, is_affine=False), "one": replace(fleet, workers=1)}
    predicted = {name: Simulation(own).run(400 * turn_s, 100 * turn_s) for name, own in fleets.items()}
    rates = {name: own.turns / own.seconds for name, own in found.items()}
    figures = {"hits_over_one_worker": found["affine"].hits / found["one"].hits}
    figures |= {"throughput_over_plain": rates["affine"] / rates["plain"]}
    figures |= {"predicted_throughput_over_plain": predicted["affine"]["turns_s"] / predicted["plain"]["turns_s"]}
    table = table_of("workers", "prefix hits", "predicted", "bank misses", "predicted")
    for name, own in found.items():
        shares = (own.hits, predicted[name]["prefix_hits"], missed[name], predicted[name]["bank_misses"])
        table.add_row(name, *[f"{share:.3f}" for share in shares])
        figures |= {f"{name}_hits": shares[0], f"{name}_hits_predicted": shares[1]}
        figures |= {f"{name}_misses": shares[2], f"{name}_misses_predicted": shares[3]}
    for name, value in figures.items():
        scale.record(name, value)
    text = f"{shown(table)}\nturns a second over Serve's router: {figures['throughput_over_plain']:.2f}, predicted "
    text += f"{figures['predicted_throughput_over_plain']:.2f}"
    print(text)
    for name, own in found.items():
        assert own.hits == pytest.approx(predicted[name]["prefix_hits"], abs=0.1)
    assert figures["hits_over_one_worker"] >= 0.9
    write_part("fleet", "four workers", figures=figures, table=text, runs=[asdict(own) for own in found.values()])
