"""A server with another base model of the same shapes, on a store that has adapters already.

Store, catalogue, encoder, index and Ingress are real.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.deployments.adapter_records import write_random_folder
from tests.deployments.app_fakes import Served
from tests.deployments.asking import error_of, lines_of
from tests.deployments.real_app import real_app

OLD, NEW = "tiny-base", "tiny-instruct"
PROMPTS = {"poet": ["Write a poem.", "Rhyme this line."], "coder": ["Write a function.", "Fix this loop."]}
REMEDY = (
    "2 adapters were made for tiny-base and are not served: start the server with base_model: tiny-base,"
    " or add the name to accepts_base if it means the same weights"
)


async def publish(client: httpx.AsyncClient, folder: Path, name: str, base: str, version: int) -> None:
    path = folder / f"{base}-{version}" / name
    write_random_folder(path, version * 10 + len(name), PROMPTS[name], base_model=base)
    answer = await client.post("/v1/loras", json={"path": str(path)})
    assert answer.status_code == 201, answer.text


@asynccontextmanager
async def server_of_the_other_base(folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Served]]:
    """Publish two versions of two adapters for one base, then yield a server of the other."""
    async with real_app(folder, base_model=f"somewhere/{OLD}") as (client, _):
        for name in PROMPTS:
            for version in (1, 2):
                await publish(client, folder, name, OLD, version)
    async with real_app(folder, base_model=f"somewhere/{NEW}") as started:
        yield started


async def strategy_of(client: httpx.AsyncClient, prompt: str) -> Any:
    answer = await client.post("/v1/route", json={"prompt": prompt, "lora": {"k": 3, "strategy": "mixture"}})
    assert answer.status_code == 200, answer.text
    plan = answer.json()["data"][0]
    return plan["strategy"], plan["candidates"]


async def test_a_server_of_another_base_offers_no_adapter_and_says_why(tmp_path: Path) -> None:
    async with server_of_the_other_base(tmp_path) as (client, served):
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


async def test_naming_an_adapter_of_another_base_names_both_bases(tmp_path: Path) -> None:
    async with server_of_the_other_base(tmp_path) as (client, served):
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


async def test_adapters_of_another_base_are_shown_rolled_back_and_withdrawn(tmp_path: Path) -> None:
    async with server_of_the_other_base(tmp_path) as (client, _):
        shown = (await client.get("/v1/loras/poet")).json()
        assert shown["base_model"] == OLD
        back = await client.post("/v1/loras/poet/rollback", json={})
        assert (back.status_code, back.json()["digest"]) == (201, shown["versions"][1]["digest"])
        gone = await client.delete("/v1/loras/poet")
        assert gone.status_code == 200
        listed = (await client.get("/v1/loras")).json()
        assert [row["num_adapters"] for row in listed["unserved"]] == [1]
        assert (await client.get("/v1/loras/poet")).status_code == 404


async def test_a_publish_for_the_served_base_takes_the_name_over(tmp_path: Path) -> None:
    async with server_of_the_other_base(tmp_path) as (client, _):
        await publish(client, tmp_path, "poet", NEW, 3)
        strategy, candidates = await strategy_of(client, "Write a poem.")
        assert (strategy, [candidate["name"] for candidate in candidates]) == ("mixture", ["poet"])
        listed = (await client.get("/v1/loras")).json()
        assert ([row["id"] for row in listed["data"]], listed["unserved"][0]["num_adapters"]) == (["poet"], 1)
