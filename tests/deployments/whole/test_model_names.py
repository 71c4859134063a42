"""Model names over the real store, catalogue and Retriever: their changes, and what they give to other tenants."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.deployments.asking import error_of
from tests.deployments.two_tenants import TENANTS, TwoTenants, two_tenants

NUM_REQUESTS = 100
CHAT = {"model": "support", "messages": [{"role": "user", "content": "Hi"}]}


async def adapters(tenants: TwoTenants, tenant: str, model: str = "support") -> tuple[int, list[str]]:
    response = await tenants.ask(tenant, "POST", "/v1/chat/completions", json=CHAT | {"model": model})
    rows = response.json()["lora"]["adapters"] if response.status_code == 200 else []
    return response.status_code, [row["name"] for row in rows]


async def put(tenants: TwoTenants, tenant: str, policy: dict[str, Any]) -> str:
    response = await tenants.ask(tenant, "PUT", "/v1/names/support", json=policy)
    assert response.status_code == 200, response.text
    digest: str = response.json()["digest"]
    return digest


async def test_a_change_is_seen_by_every_request_from_its_answer_on_and_none_fails(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        owner = TENANTS[0]
        first, second = tenants.names[owner][:2]
        await put(tenants, owner, {"model": first})
        asked = [asyncio.create_task(adapters(tenants, owner)) for _ in range(NUM_REQUESTS)]
        await put(tenants, owner, {"model": second})
        after = [asyncio.create_task(adapters(tenants, owner)) for _ in range(NUM_REQUESTS)]
        for answer in await asyncio.gather(*asked):
            assert answer in ((200, [first]), (200, [second]))
        assert await asyncio.gather(*after) == [(200, [second])] * NUM_REQUESTS
        assert (await tenants.ask(owner, "POST", "/v1/names/support/rollback", json={})).status_code == 200
        assert await adapters(tenants, owner) == (200, [first])


async def test_a_name_gives_no_tenant_adapters_or_knowledge_of_another(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        owner, other = TENANTS
        hidden = await put(tenants, owner, {"lora": {"adapters": [{"name": tenants.names[owner][0]}]}})
        for model in ("support", f"{owner}/support", f"{owner}/support@{hidden}"):
            asked = [await tenants.ask(other, "GET", f"/v1/{kind}/{model}") for kind in ("names", "models")]
            asked.append(await tenants.ask(other, "POST", "/v1/chat/completions", json=CHAT | {"model": model}))
            for response in asked:
                assert response.status_code == 404
                tenants.assert_no_leak(other, response)
        approve = f"/v1/names/{owner}/support/approve"
        refused = await tenants.ask(other, "POST", approve, json={"digest": hidden})
        assert refused.status_code == 400 and "is private" in error_of(refused)["message"]
        digest = await put(tenants, owner, {"lora": {"k": 16, "weights": "uniform", "min_score": -1}})
        assert (await tenants.ask(other, "POST", approve, json={"digest": digest})).status_code == 200
        listed = await tenants.ask(other, "GET", "/v1/models")
        assert f"{owner}/support" in [card["id"] for card in listed.json()["data"]]
        response = await tenants.ask(other, "POST", "/v1/chat/completions", json=CHAT | {"model": f"{owner}/support"})
        assert response.status_code == 200 and response.json()["lora"]["adapters"]
        for answer in (listed, response):
            tenants.assert_no_leak(other, answer)
        assert (await adapters(tenants, other, f"{owner}/support@{hidden}"))[0] == 404
