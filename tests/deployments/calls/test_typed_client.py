"""Calls that a client makes of its Protocol's methods, by the policy written there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

import pytest
from ray.exceptions import RayActorError

from deployments.calls.typed_client import ServeClient, once, retry, stream
from deployments.errors import NoAnswerInTime
from tests.deployments.calls.dying import Dying
from tests.fakes import FakeHandle
from tests.virtual_time import in_virtual_time


class Shop(Protocol):
    """One replica of a deployment."""

    @once
    async def buy(self, what: str, amount: int = 1) -> str: ...
    @retry
    async def price(self, what: str) -> str: ...
    @retry(within_s=30.0)
    async def stock(self, what: str) -> str: ...
    @retry(only_with="order_id")
    async def order(self, what: str, order_id: str | None = None) -> str: ...
    @stream
    def catalogue(self, since: int = 0) -> AsyncGenerator[int]: ...


class ShopClient(ServeClient[Shop], Shop):
    """Calls the shop through Serve."""


def client(handle: FakeHandle) -> ShopClient:
    return ShopClient(handle)  # type: ignore[abstract]


def test_arguments_are_sent_in_order_with_their_defaults() -> None:
    shop = Dying()
    assert asyncio.run(client(FakeHandle(shop)).buy("bread")) == "answer to buy"
    asyncio.run(client(FakeHandle(shop)).buy(amount=3, what="milk"))
    assert shop.received == [("buy", "bread", 1), ("buy", "milk", 3)]


def test_a_wrong_argument_is_refused_before_the_call() -> None:
    shop = Dying()
    with pytest.raises(TypeError):
        asyncio.run(client(FakeHandle(shop)).buy("bread", size=3))  # type: ignore[call-arg]
    assert shop.received == []


def test_a_keyword_only_argument_is_refused_where_the_call_is_declared() -> None:
    with pytest.raises(TypeError, match="price: a call between deployments has no keyword-only arguments"):

        @once
        async def price(self: object, *, currency: str) -> str: ...


def test_a_call_without_a_policy_is_refused_where_the_client_is_declared() -> None:
    class Bakery(Shop, Protocol):
        async def bake(self) -> str: ...

    with pytest.raises(TypeError, match=r"^Bakery\.bake sends nothing: put @retry, @once or @stream above it"):

        class _Client(ServeClient[Bakery], Bakery):
            pass

    class Baker(ServeClient[Bakery], Bakery):
        async def bake(self) -> str:
            return await self.calls.once(Bakery.bake)

    assert asyncio.run(Baker(FakeHandle(Dying())).bake()) == "answer to bake"  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("call", "num_sent"),
    [
        (lambda shop: shop.buy("bread"), 1),
        (lambda shop: shop.order("bread"), 1),
        (lambda shop: shop.order("bread", "7"), 2),
        (lambda shop: shop.order("bread", order_id="7"), 2),
        (lambda shop: shop.price("bread"), 2),
    ],
)
async def test_only_a_call_that_is_safe_to_repeat_is_repeated(
    call: Callable[[ShopClient], Awaitable[str]], num_sent: int
) -> None:
    shop = Dying(num_deaths=1)
    try:
        await call(client(FakeHandle(shop)))
    except RayActorError:
        assert num_sent == 1
    assert len(shop.received) == num_sent


@in_virtual_time
async def test_a_bounded_call_ends_without_a_replica() -> None:
    class Absent:
        async def stock(self, what: str) -> str:
            return str(await asyncio.Event().wait())

    with pytest.raises(NoAnswerInTime):
        await client(FakeHandle(Absent())).stock("bread")
    assert asyncio.get_running_loop().time() == 30.0


async def test_a_timeout_of_the_replica_is_its_own() -> None:
    class Slow:
        async def stock(self, what: str) -> str:
            raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await client(FakeHandle(Slow())).stock("bread")


async def test_every_call_goes_over_the_object_store_whatever_the_environment_prefers() -> None:
    class Numbers(Dying):
        async def catalogue(self, since: int) -> AsyncGenerator[int]:
            for number in range(since, since + 3):
                yield number

    handle = FakeHandle(Numbers())
    await client(handle).buy("bread")
    await client(handle).price("bread")
    assert [item async for item in client(handle).catalogue(since=4)] == [4, 5, 6]
    await client(handle).calls.broadcast(1.0, Shop.price, "bread")
    assert [call.by_reference for call in handle.calls] == [True] * 4
