"""A tenant learns nothing of another's private adapters, by any request."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.observability.retriever_metrics import RetrieverMetrics
from retriever_svc import IndexSettings, RouteRequest
from retriever_svc.map_layout import FEWEST_IN_CLUSTERS
from tests.deployments.metric_fakes import FakeMetrics
from tests.deployments.two_tenants import TENANTS, WORDS, Request, answer_to, plans_of, two_tenants
from tests.soak import Scale

EXACT = IndexSettings()
BY_LISTS = IndexSettings(exact_rows=0, side_rows=0, num_probes=1)
NUM_PRIVATE = 20


def searching(prompt: str) -> Iterator[Request]:
    """Return all requests that search adapters by a prompt."""
    lora = {"explain": True, "k": 16}
    message = [{"role": "user", "content": prompt}]
    yield "POST", "/v1/chat/completions", {"messages": message, "lora": lora}
    yield "POST", "/v1/responses", {"input": prompt, "lora": lora}
    yield "POST", "/v1/route", {"prompt": [prompt, "hello"], "lora": lora}
    yield "POST", "/v1/completions", {"prompt": prompt, "lora": lora | {"strategy": "selection"}}
    yield "POST", "/v1/chat/completions", {"messages": message, "lora": {"fallback": "error", "min_score": 0.999}}


BY_THE_ENCODER: tuple[Callable[[str], Request], ...] = (
    lambda text: ("POST", "/v1/pool/map", {"prompt": text}),
    lambda text: ("POST", "/v1/route", {"prompt": text}),
    lambda text: ("POST", "/v1/embeddings", {"model": "multilingual-e5-small-tasks", "input": text}),
    lambda text: ("POST", "/v1/completions", {"prompt": text}),
)


def by_the_encoder(text: str) -> Iterator[Request]:
    """Return all requests for which the encoder reads a text of the client's."""
    return (request_of(text) for request_of in BY_THE_ENCODER)


def listing() -> Iterator[Request]:
    yield "GET", "/v1/models", {}
    yield "GET", "/v1/loras", {}
    yield "POST", "/v1/pool/doctor", {}
    yield "POST", "/v1/pool/verify", {}
    yield "GET", "/ready", {}


def naming(name: str, owner: str) -> Iterator[Request]:
    """Return all requests that name an adapter, in every form."""
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for form in (name, f"{owner}/{name}", f"{owner}/{name}@{'0' * 8}"):
        yield "POST", "/v1/chat/completions", chat | {"model": form}
        yield "POST", "/v1/responses", {"input": "hi", "model": form}
        yield "POST", "/v1/completions", {"prompt": "hi", "model": f"tiny-base:{form}"}
        yield "POST", "/v1/completions", {"prompt": "hi", "lora": {"adapters": [{"name": form}]}}
        yield "POST", "/v1/route", {"prompt": "hi", "lora": {"adapters": [{"name": form}, {"name": "open-acme"}]}}
        yield "POST", "/v1/route", {"prompt": "hi", "model": form}
        yield "GET", f"/v1/models/{form}", {}
        yield "GET", f"/v1/loras/{form}", {}
        yield "DELETE", f"/v1/loras/{form}", {}
        yield "PATCH", f"/v1/loras/{form}", {"visibility": "public"}
        yield "PATCH", f"/v1/loras/{form}", {"contract": {"instruction": "Negate: {input}"}}
        yield "POST", f"/v1/loras/{form}/rollback", {}
        yield "POST", "/v1/unload_lora_adapter", {"lora_name": form}
        if "@" not in form:
            yield "POST", f"/v1/loras/{form}/approve", {"digest": "0" * 64}


@pytest.mark.parametrize("index", [EXACT, BY_LISTS], ids=["exact", "lists"])
async def test_prompts_of_anothers_tasks_and_lists_show_nothing_of_it(
    tmp_path: Path, index: IndexSettings, scale: Scale, caplog: pytest.LogCaptureFixture
) -> None:
    num_requests = scale.pick("requests", small=40, full=1000)
    with caplog.at_level(logging.INFO):
        async with two_tenants(tmp_path, NUM_PRIVATE, index=index) as tenants:
            stats = await tenants.served.retriever.index_stats.remote()
            assert stats.has_lists is (index is BY_LISTS)
            seen = set()
            for number in range(num_requests // 2):
                for mine, other in itertools.permutations(TENANTS):
                    prompt = tenants.prompts[other][number % NUM_PRIVATE]
                    # Each way to search in turn, for the same prompt at the next round; a list every tenth time.
                    requests = list(listing()) if number % 10 == 9 else list(searching(prompt))
                    request = requests[(number // 10 if number % 10 == 9 else number) % len(requests)]
                    response = await answer_to(tenants, mine, request)
                    tenants.assert_no_leak(mine, response)
                    if request[1].endswith("completions") and response.status_code == 200:
                        [*_, (job,)] = tenants.served.worker.called("stream")
                        assert [row.ref.name_for(mine) for row in job.plan.adapters] == [
                            a["name"] for a in response.json()["lora"]["adapters"]
                        ]
                    seen.add((request[1], response.status_code))
                    if request[1] == "/v1/route":
                        # All of its own: adapters of others take no place.
                        assert [len(plan["candidates"]) for plan in plans_of(response)] == [16, 16]
            assert ("/v1/chat/completions", 422) in seen and ("/v1/loras", 200) in seen
    ours = [
        r.getMessage()
        for r in caplog.records
        if r.name.partition(".")[0] in ("deployments", "lora_store", "retriever_svc")
    ]
    assert ours
    assert [line for line in ours if any(word in line for word in WORDS.values())] == []


async def test_maps_and_usage_show_nothing_of_anothers(tmp_path: Path) -> None:
    async with two_tenants(tmp_path, FEWEST_IN_CLUSTERS, cache_dir=tmp_path / "cache") as tenants:
        for mine in TENANTS:
            asked = {"model": tenants.names[mine][0], "messages": [{"role": "user", "content": "hi"}]}
            assert (await tenants.ask(mine, "POST", "/v1/chat/completions", json=asked)).status_code == 200
        for mine in TENANTS:
            drawn = await tenants.ask(mine, "GET", "/v1/pool/map")
            used = await tenants.ask(mine, "GET", f"/v1/usage?by=adapter&by=version&tenant={mine}")  # both are admins
            for response in (drawn, used):
                assert response.status_code == 200, response.text
                tenants.assert_no_leak(mine, response)
            assert len(drawn.json()["clusters"]) > 1 and drawn.json()["num_adapters"] == FEWEST_IN_CLUSTERS + 1
            assert f"{mine}/{tenants.names[mine][0]}" in used.text


async def test_explanations_show_samples_of_the_callers_own_adapters_alone(tmp_path: Path) -> None:
    async with two_tenants(tmp_path, public_requires_approval=False) as tenants:
        for mine, other in itertools.permutations(TENANTS):
            prompt = tenants.prompts[mine][0]
            lora = {"explain": True, "k": 16}
            message = [{"role": "user", "content": prompt}]
            chat = {"messages": message, "lora": lora}
            routed = await tenants.ask(mine, "POST", "/v1/route", json={"prompt": prompt, "lora": lora})
            answered = await tenants.ask(mine, "POST", "/v1/chat/completions", json=chat)
            for response, plan in ((routed, routed.json()["data"][0]), (answered, answered.json()["lora"])):
                tenants.assert_no_leak(mine, response)
                samples = {row["name"]: row.get("samples") for row in plan["candidates"]}
                assert samples[f"{other}/open-{other}"] is None  # public, but its samples are not
                assert samples[f"open-{mine}"] == [{"input": "Say hello", "score": pytest.approx(0, abs=1)}]
                assert samples[tenants.names[mine][0]][0]["input"] == prompt
            plain = await tenants.ask(mine, "POST", "/v1/route", json={"prompt": prompt})
            assert "samples" not in plain.text


def without_id(headers: httpx.Headers) -> dict[str, str]:
    """Return the response without the parts that are unique to every response."""
    return {name: value for name, value in headers.items() if name != "x-request-id"}


async def test_another_tenants_private_name_is_answered_like_an_unknown_name(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        for mine, other in itertools.permutations(TENANTS):
            private, unknown = tenants.names[other][0], "x" * len(tenants.names[other][0])
            for hit, miss in zip(naming(private, other), naming(unknown, other), strict=True):
                before = tenants.num_calls()
                found = await answer_to(tenants, mine, hit)
                between = tenants.num_calls()
                missed = await answer_to(tenants, mine, miss)
                assert found.status_code == missed.status_code >= 400, hit
                assert found.text.replace(private, unknown) == missed.text, hit
                assert without_id(found.headers) == without_id(missed.headers), hit
                assert between - before == tenants.num_calls() - between, hit  # the same work, counted
        live = tenants.store._store.snapshot()
        assert sum(record.visibility == "private" for record in live.records.values()) == 6


async def test_a_publish_reveals_nothing_of_another_tenants_adapters(tmp_path: Path) -> None:
    """Checked are the neighbours, a name that both have, the same bytes, and loaded weights."""
    async with two_tenants(tmp_path) as tenants:
        mine, other = TENANTS
        name = tenants.names[other][0]
        texts = [tenants.prompts[other][0], f"Again: {tenants.prompts[other][0]}"]
        same = tenants.folder(name, 1000, ["not the same samples"])
        for folder in (tenants.folder("near", 77, texts), same):
            response = await tenants.publish(mine, [folder])
            assert response.status_code == 201, response.text
            body = response.json()["data"][0]
            assert {n["name"] for n in body["neighbours"]}.isdisjoint(tenants.names[other])
            assert all(n["digest"][:12] not in tenants.secrets[other].pattern for n in body["neighbours"])
        loaded = {"lora_name": tenants.names[other][1], "lora_path": str(tenants.folder("near", 78, texts))}
        response = await tenants.ask(mine, "POST", "/v1/load_lora_adapter", json=loaded)
        assert response.status_code == 200, response.text
        claims = {"visibility": "public"}
        response = await tenants.ask(
            mine, "PATCH", f"/v1/loras/{name}", json=claims
        )  # a private name does not claim the bare name
        assert response.status_code == 200
        response = await tenants.ask(other, "PATCH", f"/v1/loras/{name}", json=claims)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "name_taken")
        response = await tenants.publish(other, [same], visibility="public")
        assert (response.status_code, response.json()["data"][0]["status"]) == (207, 409)


async def test_every_reported_name_means_the_reported_adapter(tmp_path: Path) -> None:
    """Also if the caller's own private adapter has the bare name of another tenant's public one."""
    async with two_tenants(tmp_path) as tenants:
        texts = ["Sing of the sea."]
        for number, (tenant, visibility) in enumerate(zip(TENANTS, ("public", "private"), strict=True)):
            folder = tenants.folder("same", 300 + number, [*texts, f"Number {number}."])
            assert (await tenants.publish(tenant, [folder], visibility=visibility)).status_code == 201
        for tenant, expected in zip(TENANTS, ({"same"}, {"same", f"{TENANTS[0]}/same"}), strict=True):
            reported: dict[str, str] = {}
            for path in ("/v1/loras", "/v1/models"):
                for row in (await tenants.ask(tenant, "GET", path)).json()["data"]:
                    reported.setdefault(row["id"], row.get("digest", ""))
            body = {"prompt": texts, "lora": {"k": 16}}
            for plan in plans_of(await tenants.ask(tenant, "POST", "/v1/route", json=body)):
                assert len({row["name"] for row in plan["adapters"]}) == len(plan["adapters"])
                for row in (*plan["adapters"], *plan["candidates"]):
                    assert reported[row["name"]] == row["digest"]
            assert {name for name in reported if name.endswith("same")} == expected
            for name, digest in reported.items():
                asked = await tenants.ask(tenant, "POST", "/v1/completions", json={"prompt": "hi", "model": name})
                assert asked.status_code == 200, (name, asked.text)
                assert (await tenants.ask(tenant, "GET", f"/v1/models/{name}")).json()["id"] == name
                if digest:
                    assert [row["digest"] for row in asked.json()["lora"]["adapters"]] == [digest]
                    assert (await tenants.ask(tenant, "GET", f"/v1/loras/{name}")).json()["digest"] == digest


async def test_metrics_name_public_adapters_only(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as tenants:
        kinds = FakeMetrics()
        retriever: Any = tenants.served.retriever.replicas[0]
        retriever._metrics = RetrieverMetrics(kinds)
        for mine, other in itertools.permutations(TENANTS):
            for prompt in (*tenants.prompts[mine], *tenants.prompts[other], "Say hello"):
                for answer in await asyncio.to_thread(retriever._retriever.route, [RouteRequest(prompt, mine)]):
                    retriever._metrics.record_route(answer)
        await retriever._report()
        reported = {label for metric in kinds.metrics.values() for labels in metric.last for label in labels}
        assert {f"open-{tenant}" for tenant in TENANTS} <= reported
        assert not [label for label in reported if any(word in label for word in WORDS.values())]


async def test_other_tenants_texts_do_not_change_the_encoders_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response time would show whether a text is computed, so computations are counted."""
    async with two_tenants(tmp_path, num_private=len(BY_THE_ENCODER)) as tenants:
        computed = tenants.computed_texts(monkeypatch)
        asked = {tenant: f"What {tenant} asked alone." for tenant in TENANTS}
        for tenant in TENANTS:
            for request in by_the_encoder(asked[tenant]):
                assert (await answer_to(tenants, tenant, request)).status_code == 200
            assert (await answer_to(tenants, tenant, ("POST", "/v1/pool/doctor", {}))).status_code == 200
        for mine, other in itertools.permutations(TENANTS):
            for number, request_of in enumerate(BY_THE_ENCODER):
                texts = [tenants.prompts[other][number], f"{asked[other]} {number}", f"New to {mine}: {number}"]
                if number == 0:
                    texts.append(asked[other])
                for text in texts:
                    await answer_to(tenants, other, request_of(text))
                    computed.clear()
                    for _ in range(2):
                        assert (await answer_to(tenants, mine, request_of(text))).status_code == 200
                    assert computed == [text], request_of(text)[1]  # once, for its own tenant
