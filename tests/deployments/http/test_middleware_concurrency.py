"""Requests that an Ingress replica refuses at once because it is at its limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.auth.authenticator import ANONYMOUS_TENANT, WAITS_S, InFlight
from deployments.errors import ServerOverloaded
from tests.clocks import Clock
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.asking import error_of
from tests.deployments.held_worker import CHAT, Held
from tests.deployments.key_files import bearer, entry, write


@asynccontextmanager
async def two_held(body: dict[str, Any] | None = None) -> AsyncIterator[tuple[httpx.AsyncClient, Served]]:
    """Yield a client while two requests fill a replica with two places."""
    worker = Held()
    served = serve_plainly(worker=worker, max_concurrent_requests=2)
    async with http_of(served) as client:
        held = [asyncio.create_task(client.post("/v1/chat/completions", json=body or CHAT)) for _ in range(2)]
        await worker.has(2)
        yield client, served
        worker.let_go.set()
        assert [response.status_code for response in await asyncio.gather(*held)] == [200, 200]
    assert served.services.in_flight.count == 0


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_above_the_limit_is_refused_with_retry_after(streamed: bool) -> None:
    async with two_held(CHAT | {"stream": streamed}) as (client, _):
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("overloaded_error", "overloaded")
    assert "2 concurrent requests" in error["message"]


async def test_the_body_of_a_refused_request_is_not_read() -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(True)
        yield b"{}"

    async with two_held() as (client, _):
        assert (await client.post("/v1/chat/completions", content=body())).status_code == 429
    assert not read


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_a_probe_is_answered_at_any_load(path: str) -> None:
    async with two_held() as (client, served):
        await served.services.preload.wait()
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/loras/health", "/v1/models/ready"])
async def test_a_path_that_only_ends_like_a_probe_is_not_one(path: str) -> None:
    async with two_held() as (client, _):
        assert (await client.get(path)).status_code == 429


async def test_a_place_is_free_after_an_answer_an_error_or_a_disconnect() -> None:
    worker = Held()
    served = serve_plainly(worker=worker, max_concurrent_requests=1)
    async with http_of(served) as client:
        leaving = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await worker.has(1)
        assert served.services.in_flight.count == 1
        leaving.cancel()
        await asyncio.wait([leaving])
        assert served.services.in_flight.count == 0
        worker.let_go.set()
        for body, status in [(CHAT, 200), ({}, 400), (CHAT | {"model": "nobody"}, 404), (CHAT, 200)]:
            assert (await client.post("/v1/chat/completions", json=body)).status_code == status
    assert served.services.in_flight.count == 0


class Places(InFlight):
    """Keeps each place until it is left."""

    def __init__(self, limit: int, clock: Clock | None = None) -> None:
        super().__init__(limit, clock or Clock())
        self.held: dict[str, list[ExitStack]] = {}

    def enter(self, tenant: str) -> None:
        place = ExitStack()
        place.enter_context(self.place(tenant))
        self.held.setdefault(tenant, []).append(place)

    def leave(self, tenant: str) -> None:
        self.held[tenant].pop().close()


def is_let_in(in_flight: Places, tenant: str) -> bool:
    try:
        in_flight.enter(tenant)
    except ServerOverloaded:
        return False
    return True


def test_a_single_tenant_may_use_every_place() -> None:
    in_flight = Places(10)
    assert [is_let_in(in_flight, "a") for _ in range(12)] == [True] * 10 + [False] * 2
    assert in_flight.count == 10


def test_freed_places_go_to_a_refused_tenant_up_to_its_share() -> None:
    in_flight = Places(10)
    assert all(is_let_in(in_flight, "flood") for _ in range(10))
    for _ in range(5):
        assert not is_let_in(in_flight, "late")
        in_flight.leave("flood")
        assert not is_let_in(in_flight, "flood")
        assert is_let_in(in_flight, "late")
    assert not is_let_in(in_flight, "late")  # both tenants have their share
    in_flight.leave("flood")
    assert is_let_in(in_flight, "flood")


def test_requests_without_a_caller_do_not_reduce_a_single_tenants_places() -> None:
    in_flight = Places(10)
    assert all(is_let_in(in_flight, "a") for _ in range(10))
    assert not is_let_in(in_flight, ANONYMOUS_TENANT)
    in_flight.leave("a")
    assert is_let_in(in_flight, "a")


def test_requests_without_a_caller_have_no_share_and_yield_to_waiting_tenants() -> None:
    in_flight = Places(10)
    assert all(is_let_in(in_flight, "a") for _ in range(8))
    assert is_let_in(in_flight, ANONYMOUS_TENANT) and is_let_in(in_flight, ANONYMOUS_TENANT)
    assert not is_let_in(in_flight, "late")
    for _ in range(5):
        in_flight.leave("a")
    in_flight.leave(ANONYMOUS_TENANT)
    assert not is_let_in(in_flight, ANONYMOUS_TENANT)
    assert [is_let_in(in_flight, "a") for _ in range(3)] == [True, True, False]
    assert is_let_in(in_flight, "late")


def test_a_tenant_that_does_not_retry_blocks_no_other_for_long() -> None:
    clock = Clock()
    in_flight = Places(2, clock)
    assert is_let_in(in_flight, "a") and is_let_in(in_flight, "a") and not is_let_in(in_flight, "gone")
    in_flight.leave("a")
    assert not is_let_in(in_flight, "a")
    clock.at += WAITS_S
    assert is_let_in(in_flight, "a")


def test_many_tenants_have_at_least_one_place_each() -> None:
    in_flight = Places(3)
    assert all(is_let_in(in_flight, "flood") for _ in range(3))
    for number in range(5):
        assert not is_let_in(in_flight, f"tenant {number}")
    for number in range(3):
        in_flight.leave("flood")
        assert is_let_in(in_flight, f"tenant {number}")
        assert not is_let_in(in_flight, f"tenant {number}")


async def test_over_http_the_share_belongs_to_the_keys_tenant(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", *[entry(tenant, tenant) for tenant in ("flood", "late")])
    worker = Held()
    served = serve_plainly(worker=worker, max_concurrent_requests=2, keys_file=keys)

    async def post(tenant: str) -> int:
        headers = bearer(tenant)
        return (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code

    async with http_of(served) as client:
        held = [asyncio.create_task(post("flood")) for _ in range(2)]
        await worker.has(2)
        statuses = [await post("late")]
        held[0].cancel()
        await asyncio.wait([held[0]])
        statuses.append(await post("flood"))
        late = asyncio.create_task(post("late"))
        await worker.has(3)
        worker.let_go.set()
        assert [*statuses, await late, await held[1]] == [429, 429, 200, 200]
