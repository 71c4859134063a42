"""Changes of a caller's own adapter, and where FastAPI runs the dependencies of a request."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from fastapi.dependencies.models import Dependant

from deployments.auth.authenticator import Caller, Role
from deployments.http.dependencies import own_key
from lora_store import AdapterNotFound, AdapterRecord, Key
from tests.deployments.adapter_records import POOL, adapter
from tests.deployments.all_routes import ROLES_OF, mounted
from tests.deployments.asking import asked
from tests.deployments.fake_retriever import FakeRetriever

CALLER = Caller("acme", frozenset[Role]({"publish"}), "ci")


async def test_an_own_adapter_is_named_with_or_without_the_tenant() -> None:
    assert await key_of("poet") == await key_of("acme/poet") == ("acme", "poet")
    with pytest.raises(AdapterNotFound, match="no adapter 'globex/poet'"):
        await key_of("globex/poet")


async def key_of(name: str, *held: AdapterRecord, change: Callable[[], None] = lambda: None) -> Key:
    """Return the key of a caller's adapter, after a change of it."""
    retriever = FakeRetriever(held=held or POOL)
    async with asked(retriever=retriever) as (_, served), own_key(name, CALLER, served.services) as key:
        change()
    return key


def not_found() -> None:
    raise AdapterNotFound("poet")


PUBLIC = adapter("poet", tenant="globex")


@pytest.mark.parametrize("name", ["globex/poet", "poet"])
async def test_a_change_of_anothers_public_adapter_says_whose_it_is(name: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        await key_of(name, PUBLIC, change=not_found)
    assert str(caught.value) == f"{name!r} belongs to tenant 'globex'; only its own keys may change it"


@pytest.mark.parametrize("held", [replace(PUBLIC, visibility="private"), adapter("poet", tenant="acme")])
async def test_neither_a_private_nor_an_own_adapter_gets_an_owner(held: AdapterRecord) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        await key_of("poet", held, change=not_found)
    assert str(caught.value) == "no adapter 'poet'"


def test_no_request_visits_another_thread_for_a_dependency() -> None:
    """FastAPI calls plain functions in a pool of threads, which costs more than any of these."""

    def below(dependant: Dependant) -> Iterator[Dependant]:
        for child in dependant.dependencies:
            yield from (child, *below(child))

    asked = {key: [child.call for child in below(mounted()[key].dependant)] for key in ROLES_OF}
    assert min(len(calls) for calls in asked.values()) >= 2  # at least the services and the caller
    plain = {call for calls in asked.values() for call in calls if inspect.isfunction(call)}
    assert len(plain) >= 7  # services, context, caller, a caller for each of three roles, and changes
    assert [call for call in plain if not inspect.iscoroutinefunction(call)] == []
