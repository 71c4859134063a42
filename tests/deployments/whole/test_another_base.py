"""A server with another base model of the same shapes, on a store that has adapters already.

Store, catalogue, encoder, index and Ingress are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from deployments.config.app import RetrievalSettings
from deployments.ingress import Ingress
from deployments.retriever import RetrieverDeployment
from deployments.store import StoreDeployment
from lora_store import ModuleWeights, Sample, write_peft_folder
from tests.deployments.app_fakes import Served, config_of, http_of
from tests.deployments.asking import error_of, lines_of
from tests.deployments.console_fakes import CountingWorker
from tests.fakes import FakeHandle

OLD, NEW = "tiny-base", "tiny-instruct"
MODULE = "model.layers.0.mlp.up_proj"
PROMPTS = {"poet": ["Write a poem.", "Rhyme this line."], "coder": ["Write a function.", "Fix this loop."]}
REMEDY = (
    "2 adapters were made for tiny-base and are not served: start the server with base_model: tiny-base,"
    " or add the name to accepts_base if it means the same weights"
)
Scenario = Callable[[httpx.AsyncClient, Served], Awaitable[None]]


class QuietWorker(CountingWorker):
    """Accepts the small adapters of this file."""

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        return {MODULE: (8, 6)}


@asynccontextmanager
async def serving(folder: Path, base: str, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Served]]:
    retrieval = RetrievalSettings(encoder_threads=1, min_score=-1.0)
    config = config_of(base_model=f"somewhere/{base}", store_uri=str(folder / "pool"), retrieval=retrieval, **settings)
    retriever = RetrieverDeployment(config, poll_interval_s=3600.0)
    asked, worker = FakeHandle(retriever), FakeHandle(QuietWorker())
    store = FakeHandle(StoreDeployment(config, put=lambda b: b))
    served = Served(Ingress(config, asked, dict.fromkeys(config.by_model, worker), store), asked, worker, store)
    try:
        await served.services.preload.wait()
        async with http_of(served) as client:
            yield client, served
        await served.services.background.idle()
    finally:
        retriever._polling.cancel()


async def publish(client: httpx.AsyncClient, folder: Path, name: str, base: str, version: int) -> None:
    path = folder / f"{base}-{version}" / name
    random = torch.Generator().manual_seed(version * 10 + len(name))
    weights = ModuleWeights(torch.randn(2, 6, generator=random), torch.randn(8, 2, generator=random), 2.0)
    samples = [Sample(text) for text in PROMPTS[name]]
    write_peft_folder(path, {MODULE: weights}, base_model=base, samples=samples)
    answer = await client.post("/v1/loras", json={"path": str(path)})
    assert answer.status_code == 201, answer.text


def on_a_server_of_the_other_base(folder: Path, scenario: Scenario, **settings: Any) -> None:
    """Publish two versions of two adapters for one base, then run the scenario on a server of the other."""

    async def run() -> None:
        async with serving(folder, OLD) as (client, _):
            for name in PROMPTS:
                for version in (1, 2):
                    await publish(client, folder, name, OLD, version)
        async with serving(folder, NEW, **settings) as (client, served):
            await asyncio.wait_for(scenario(client, served), 60)

    asyncio.run(run())


async def strategy_of(client: httpx.AsyncClient, prompt: str) -> Any:
    answer = await client.post("/v1/route", json={"prompt": prompt, "lora": {"k": 3, "strategy": "mixture"}})
    assert answer.status_code == 200, answer.text
    plan = answer.json()["data"][0]
    return plan["strategy"], plan["candidates"]


def test_a_server_of_another_base_offers_no_adapter_and_says_why(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, served: Served) -> None:
        unserved = [{"base_model": OLD, "num_adapters": 2, "text": REMEDY}]
        assert await strategy_of(client, "Write a poem.") == ("base", [])
        cards = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["auto", NEW]
        listed = (await client.get("/v1/loras")).json()
        assert (listed["data"], listed["total"], listed["unserved"]) == ([], 0, unserved)
        ready = (await client.get("/ready")).json()
        assert (ready["num_adapters"], ready["unserved"]) == (0, unserved)
        assert (await served.ingress.started())["unserved"] == unserved
        assert (await client.get("/v1/pool/map")).json()["points"] == []
        report = lines_of(await client.post("/v1/pool/doctor", json={}))[-1]["result"]
        advice = {"problem": "unserved", "adapters": ["coder", "poet"], "text": f"{REMEDY}."}
        assert (report["num_adapters"], report["advice"]) == (0, [advice])

    on_a_server_of_the_other_base(tmp_path, scenario)


def test_naming_an_adapter_of_another_base_names_both_bases(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, served: Served) -> None:
        versions = (await client.get("/v1/loras/poet")).json()["versions"]
        question = {"messages": [{"role": "user", "content": "Write a poem."}]}
        pinned = {"name": "poet", "digest": versions[0]["digest"], "weight": 1.0}
        named = {"adapters": [{"name": "poet"}, {"name": "coder"}], "strategy": "fusion"}
        for asked in (
            {"model": "poet"},
            {"model": f"{NEW}:poet"},
            {"model": f"poet@{versions[1]['digest']}"},
            {"model": "auto", "lora": named},
            {"model": "auto", "lora": {"plan": {"strategy": "selection", "generation": 4, "adapters": [pinned]}}},
        ):
            answer = await client.post("/v1/chat/completions", json={**question, **asked})
            error = error_of(answer)
            assert (answer.status_code, error["code"]) == (400, "adapter_incompatible"), (asked, error)
            assert f"was made for the base model '{OLD}', and this server serves '{NEW}'" in error["message"]
        card = await client.get("/v1/models/poet")
        assert (card.status_code, error_of(card)["code"]) == (400, "adapter_incompatible")
        assert not served.worker.called("stream")

    on_a_server_of_the_other_base(tmp_path, scenario)


def test_adapters_of_another_base_are_shown_rolled_back_and_withdrawn(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, served: Served) -> None:
        shown = (await client.get("/v1/loras/poet")).json()
        assert shown["base_model"] == OLD
        back = await client.post("/v1/loras/poet/rollback", json={})
        assert (back.status_code, back.json()["digest"]) == (201, shown["versions"][1]["digest"])
        gone = await client.delete("/v1/loras/poet")
        assert gone.status_code == 200
        listed = (await client.get("/v1/loras")).json()
        assert [row["num_adapters"] for row in listed["unserved"]] == [1]
        assert (await client.get("/v1/loras/poet")).status_code == 404

    on_a_server_of_the_other_base(tmp_path, scenario)


def test_a_publish_for_the_served_base_takes_the_name_over(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, served: Served) -> None:
        await publish(client, tmp_path, "poet", NEW, 3)
        strategy, candidates = await strategy_of(client, "Write a poem.")
        assert (strategy, [candidate["name"] for candidate in candidates]) == ("mixture", ["poet"])
        listed = (await client.get("/v1/loras")).json()
        assert ([row["id"] for row in listed["data"]], listed["unserved"][0]["num_adapters"]) == (["poet"], 1)

    on_a_server_of_the_other_base(tmp_path, scenario)


def test_the_setting_accepts_base_serves_them_again(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, served: Served) -> None:
        _, candidates = await strategy_of(client, "Write a poem.")
        assert sorted(candidate["name"] for candidate in candidates) == ["coder", "poet"]
        listed = (await client.get("/v1/loras")).json()
        assert (listed["total"], listed["unserved"]) == (2, [])

    on_a_server_of_the_other_base(tmp_path, scenario, accepts_base=(OLD,))
