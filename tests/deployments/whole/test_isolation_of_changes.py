"""A tenant learns nothing of another's changes to the pool: names, numbers, or that there were any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments import retriever
from tests.deployments.asking import error_of
from tests.deployments.two_tenants import TENANTS, Request, TwoTenants, answer_to, two_tenants


async def test_a_withdrawn_name_means_no_other_tenants_adapter(tmp_path: Path) -> None:
    """Neither does a misspelt name: clients would get weights that a stranger chose."""
    async with two_tenants(tmp_path) as tenants:
        acme, globex = TENANTS
        texts = ["Sing of the sea."]
        assert (await tenants.publish(acme, [tenants.folder("poet", 300, texts)])).status_code == 201
        squat = await tenants.publish(globex, [tenants.folder("poet", 301, [*texts, "More."])], visibility="public")
        assert squat.status_code == 201
        assert (await tenants.ask(acme, "DELETE", "/v1/loras/poet")).status_code == 200
        for request in naming_to_answer("poet"):
            response = await answer_to(tenants, acme, request)
            assert response.status_code == 404, (request, response.text)
            assert "did you mean 'globex/poet'?" in response.json()["error"]["message"]
        for request in naming_to_answer("globex/poet"):
            assert (await answer_to(tenants, acme, request)).status_code == 200, request
        for request in naming_to_answer("poet"):
            assert (await answer_to(tenants, globex, request)).status_code == 200, request


async def generations_told(tenants: TwoTenants, tenant: str) -> list[Any]:
    """Return every generation that the routes report to this tenant."""
    name = f"open-{tenant}"
    route = await tenants.ask(tenant, "POST", "/v1/route", json={"prompt": "hi", "lora": {"explain": True}})
    named = {"prompt": "hi", "lora": {"adapters": [{"name": name}]}}
    doctor = await tenants.ask(tenant, "POST", "/v1/pool/doctor", json={})
    answers = {
        path: (await tenants.ask(tenant, "GET", path)).json()
        for path in ("/v1/loras", "/v1/pool/map", "/v1/stats", f"/v1/loras/{name}")
    }
    stale = await tenants.ask(tenant, "GET", "/v1/loras", params={"min_generation": 10**9})
    assert stale.status_code == 503
    return [
        route.json()["data"][0]["generation"],
        (await tenants.ask(tenant, "POST", "/v1/route", json=named)).json()["data"][0]["generation"],
        (await tenants.ask(tenant, "POST", "/v1/pool/map", json={"prompt": "hi"})).json()["generation"],
        json.loads(doctor.text.splitlines()[-1])["result"]["generation"],
        answers["/v1/loras"]["generation"],
        answers["/v1/pool/map"]["generation"],
        answers["/v1/stats"]["pool"]["generation"],
        answers["/v1/stats"]["pool"]["oldest_generation"],
        answers[f"/v1/loras/{name}"]["catalogue_generation"],
        error_of(stale)["message"],
    ]


async def test_no_reported_generation_changes_with_anothers_private_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retriever, "_READ_EVERY_S", 0.0)  # reads of a future generation wait for it
    async with two_tenants(tmp_path) as tenants:
        mine, other = TENANTS
        before = await generations_told(tenants, mine)
        [newest] = set(before[:-1])
        for number in range(2):
            folder = tenants.folder(f"more-{number}", 400 + number, ["A secret task."])
            assert (await tenants.publish(other, [folder])).status_code == 201
            assert await generations_told(tenants, mine) == before
        assert (await tenants.ask(other, "DELETE", "/v1/loras/more-0")).status_code == 200
        assert await generations_told(tenants, mine) == before
        for path in ("/v1/loras", "/v1/pool/map"):  # nor can it be found out by requesting one
            later = await tenants.ask(mine, "GET", path, params={"min_generation": newest + 1})
            assert later.status_code == 503
            assert (await tenants.ask(mine, "GET", path, params={"min_generation": newest})).status_code == 200


async def test_a_change_that_was_made_already_tells_no_generation_of_anothers_private_change(tmp_path: Path) -> None:
    """A client that waits for the answered generation finds it served."""
    async with two_tenants(tmp_path) as tenants:
        mine, other = TENANTS
        name = tenants.names[mine][0]
        named = await tenants.ask(mine, "PUT", "/v1/names/fast", json={"model": name})
        secret = tenants.folder("secret", 700, ["A secret task."])
        assert (await tenants.publish(other, [secret])).status_code == 201
        for method, path, body in (
            ("PATCH", f"/v1/loras/{name}", {"visibility": "private"}),
            ("PUT", "/v1/names/fast", {"model": name}),
            ("POST", f"/v1/loras/{name}/share", {"share": 0}),
            ("POST", "/v1/pool/evaluate", {}),
        ):
            answer = await tenants.ask(mine, method, path, json=body)
            last = json.loads(answer.text.splitlines()[-1])
            assert last.get("result", last)["generation"] == named.json()["generation"], path
        listed = await tenants.ask(mine, "GET", "/v1/loras", params={"min_generation": named.json()["generation"]})
        assert listed.status_code == 200


def naming_to_answer(name: str) -> Iterator[Request]:
    """Return all requests that the adapter of this name answers."""
    yield "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "model": name}
    yield "POST", "/v1/completions", {"prompt": "hi", "model": f"tiny-base:{name}"}
    yield "POST", "/v1/route", {"prompt": "hi", "lora": {"adapters": [{"name": name}]}}
    yield "GET", f"/v1/models/{name}", {}
    yield "GET", f"/v1/loras/{name}", {}


async def test_a_tenant_reads_its_own_change(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        mine, other = TENANTS
        for number, visibility in enumerate(("private", "public", "private")):
            noise = tenants.folder(f"noise-{number}", 500 + number, ["Noise."])
            assert (await tenants.publish(other, [noise])).status_code == 201
            folder = tenants.folder("own", 600 + number, [f"Version {number}."])
            published = (await tenants.publish(mine, [folder], visibility=visibility)).json()["data"][0]
            listed = await tenants.ask(
                mine, "GET", "/v1/loras", params={"min_generation": published["generation"], "search": "own"}
            )
            assert listed.status_code == 200
            assert listed.json()["generation"] >= published["generation"]
            assert published["digest"] in [row["digest"] for row in listed.json()["data"]]
        gone = (await tenants.ask(mine, "DELETE", "/v1/loras/own")).json()
        listed = await tenants.ask(mine, "GET", "/v1/loras", params={"min_generation": gone["generation"]})
        assert "own" not in [row["id"] for row in listed.json()["data"]]
        assert listed.json()["generation"] == gone["generation"]
