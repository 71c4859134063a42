"""Learning on a real store, encoder, index and Ingress: what one tenant says changes nothing for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.publishing import learning
from tests.deployments.two_tenants import TwoTenants, two_tenants

NAME = "zebra-0"
PATH = f"/v1/loras/{NAME}"


def chat(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1, **fields}


async def send(tenants: TwoTenants, tenant: str, path: str, body: dict[str, Any]) -> Any:
    answer = await tenants.ask(tenant, "POST", path, json=body)
    await tenants.served.services.background.idle()
    assert answer.is_success, answer.text
    return answer


async def candidates(tenants: TwoTenants, tenant: str, prompt: str) -> dict[str, dict[str, Any]]:
    answer = await send(tenants, tenant, "/v1/route", {"prompt": prompt, "lora": {"k": 16}})
    [plan] = answer.json()["data"]
    return {row["name"]: row for row in plan["candidates"]}


async def test_a_named_prompt_is_proposed_accepted_found_and_undone(tmp_path: Path) -> None:
    prompt = "Kannst du mir die Steuersache kurz zusammenfassen?"
    async with two_tenants(tmp_path, learning="observe") as tenants:
        before = await candidates(tenants, "acme", prompt)
        await send(tenants, "acme", "/v1/chat/completions", chat(prompt, model=NAME))
        shown = (await tenants.ask("acme", "GET", PATH, params={"proposed": "true"})).json()
        [proposed] = shown["proposed"]
        assert (proposed["input"], proposed["key_id"]) == (prompt, "id-acme")
        foreign = await tenants.ask("globex", "GET", PATH, params={"proposed": "true"})
        assert (foreign.status_code, prompt in foreign.text) == (404, False)

        accepted = await send(tenants, "acme", f"{PATH}/samples", {"action": "accept"})
        assert accepted.json()["digest"] != shown["digest"]
        now = (await tenants.ask("acme", "GET", PATH, params={"proposed": "true", "samples": 9})).json()
        assert (now["proposed"], now["samples"][-1]["input"]) == ([], prompt)
        assert (now["weights_digest"], now["num_samples"]) == (shown["weights_digest"], shown["num_samples"] + 1)
        after = await candidates(tenants, "acme", prompt)
        assert after[NAME]["score"] > before[NAME]["score"] + 0.05

        await send(tenants, "acme", f"{PATH}/samples", {"action": "undo"})
        assert (await tenants.ask("acme", "GET", PATH)).json()["digest"] == shown["digest"]
        undone = await candidates(tenants, "acme", prompt)
        assert undone[NAME]["score"] == before[NAME]["score"]


async def test_an_outcome_changes_the_choices_of_its_own_tenant_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("QUIET_S", "REST_FACTOR"):
        monkeypatch.setattr(learning, pause, 0)
    prompt = "Guten Tag, ich hätte da mal eine Frage zu etwas ganz anderem."
    async with two_tenants(tmp_path, learning="apply") as tenants:
        asked = await send(tenants, "acme", "/v1/chat/completions", chat(prompt))
        rival = await candidates(tenants, "globex", prompt)
        body = {"request_id": asked.headers["x-request-id"], "adapter": "zebra-2", "score": 1}
        await send(tenants, "acme", "/v1/outcomes", body)
        praised = await candidates(tenants, "acme", prompt)
        assert next(iter(praised)) == "zebra-2"
        assert praised["zebra-2"]["outcome"] == 1
        await send(tenants, "acme", "/v1/outcomes", {**body, "score": -1})
        answer = (await send(tenants, "acme", "/v1/route", {"prompt": prompt, "lora": {"k": 16}})).json()["data"][0]
        assert "zebra-2" not in [row["name"] for row in answer["adapters"]]
        assert "Outcomes of nearly the same prompts speak against zebra-2." in answer["why"]
        await send(tenants, "acme", "/v1/outcomes", {**body, "adapter": None, "score": 1})
        answer = (await send(tenants, "acme", "/v1/route", {"prompt": prompt})).json()["data"][0]
        assert (answer["strategy"], answer["adapters"]) == ("base", [])
        assert await candidates(tenants, "globex", prompt) == rival
        await send(tenants, "acme", "/v1/outcomes", {**body, "score": 0})
        assert all("outcome" not in row for row in (await candidates(tenants, "acme", prompt)).values())
