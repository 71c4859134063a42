"""Permissions to change the pool, publish folders, reindex and approve, from settings, key and address."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.dependencies.models import Dependant

from deployments.api.adapters import PublishItem
from deployments.auth.authenticator import LOCAL_CALLER, Caller, Role
from deployments.errors import KeyRefused, PublishingDisabled, RoleMissing, SelfApproval
from deployments.http.api import build_api
from deployments.http.dependencies import (
    Services,
    find_caller,
    find_services,
    make_item,
    own_key,
    require_approver,
    require_change,
    require_encoder,
    require_role,
)
from deployments.observability.request_context import find_context
from lora_store import AdapterNotFound, AdapterRecord, Key
from tests.deployments.adapter_records import POOL, adapter
from tests.deployments.all_routes import ROLES_OF, mounted
from tests.deployments.app_fakes import serve_plainly, with_context
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.key_files import entry, write

HERE, ELSEWHERE = "127.0.0.1", "10.0.0.1"
CALLER = Caller("acme", frozenset[Role]({"publish"}), "ci")


def services(**settings: Any) -> Services:
    return asyncio.run(build(**settings))


async def build(**settings: Any) -> Services:
    served = serve_plainly(**settings)
    await served.services.preload.wait()
    return served.services


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.json", entry("k"))


def request_from(host: str, **scope: Any) -> Request:
    return Request({"type": "http", "method": "POST", "path": "/", "headers": [], "client": (host, 5000), **scope})


def is_allowed(check: Any, *arguments: Any) -> bool:
    try:
        if asyncio.iscoroutine(checking := check(*arguments)):
            asyncio.run(checking)
    except PublishingDisabled:
        return False
    return True


def test_without_keys_only_local_clients_change_the_pool_unless_the_settings_allow_more() -> None:
    own, remote = services(), services(allow_remote_publish=True)
    allowed = [
        is_allowed(require_change, each, request_from(host)) for each in (own, remote) for host in (HERE, ELSEWHERE)
    ]
    assert allowed == [True, False, True, True]


def test_with_keys_the_role_decides_and_not_the_address(keys: Path) -> None:
    assert is_allowed(require_change, services(keys_file=keys), request_from(ELSEWHERE))


def test_without_keys_only_local_clients_may_name_any_encoder() -> None:
    assert is_allowed(require_encoder, services(), "any/model", request_from(HERE))
    assert not is_allowed(require_encoder, services(), "any/model", request_from(ELSEWHERE))


def test_with_keys_only_listed_encoders_are_accepted(keys: Path) -> None:
    served = services(keys_file=keys, encoders=("listed/model",), retrieval={"encoder": "own/model"})
    names = ("listed/model", "own/model", "any/model")
    assert [is_allowed(require_encoder, served, name, request_from(HERE)) for name in names] == [True, True, False]


def test_with_keys_an_admin_approves_for_other_tenants_unless_the_settings_allow_its_own(keys: Path) -> None:
    own, other = adapter("plan", tenant="acme").ref, adapter("plan", tenant="globex").ref
    require_approver(services(keys_file=keys), other, CALLER)
    require_approver(services(keys_file=keys, allow_self_approval=True), own, CALLER)
    require_approver(services(), own, CALLER)
    with pytest.raises(SelfApproval):
        require_approver(services(keys_file=keys), own, CALLER)


def test_an_item_is_published_as_the_callers_tenant_with_the_servers_visibility(keys: Path) -> None:
    served = services(keys_file=keys)
    item = make_item(served, PublishItem(name="poet", files={}), CALLER, request_from(ELSEWHERE))
    assert (item.tenant, item.default_visibility, item.name) == ("acme", "private", "poet")


@pytest.mark.parametrize(
    ("settings", "host", "expected"),
    [
        ({"publish_paths": True}, HERE, True),
        ({"publish_paths": True}, ELSEWHERE, False),
        ({"publish_paths": False}, HERE, False),
    ],
)
def test_folders_of_the_server_are_published_from_its_own_machine(
    settings: dict[str, Any], host: str, expected: bool
) -> None:
    served = services(**settings)
    assert is_allowed(make_item, served, PublishItem(Path("/a/poet")), LOCAL_CALLER, request_from(host)) == expected


def test_an_own_adapter_is_named_with_or_without_the_tenant() -> None:
    assert key_of("poet") == key_of("acme/poet") == ("acme", "poet")
    with pytest.raises(AdapterNotFound, match="no adapter 'globex/poet'"):
        key_of("globex/poet")


def key_of(name: str, *held: AdapterRecord, change: Callable[[], None] = lambda: None) -> Key:
    """Return the key of a caller's adapter, after a change of it."""

    async def run() -> Key:
        served = await build(retriever=FakeRetriever(held=held or POOL))
        async with own_key(name, CALLER, served) as key:
            change()
        return key

    return asyncio.run(run())


def not_found() -> None:
    raise AdapterNotFound("poet")


PUBLIC = adapter("poet", tenant="globex")


@pytest.mark.parametrize("name", ["globex/poet", "poet"])
def test_a_change_of_anothers_public_adapter_says_whose_it_is(name: str) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        key_of(name, PUBLIC, change=not_found)
    assert str(caught.value) == f"{name!r} belongs to tenant 'globex'; only its own keys may change it"


@pytest.mark.parametrize("held", [replace(PUBLIC, visibility="private"), adapter("poet", tenant="acme")])
def test_neither_a_private_nor_an_own_adapter_gets_an_owner(held: AdapterRecord) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        key_of("poet", held, change=not_found)
    assert str(caught.value) == "no adapter 'poet'"


def test_a_request_has_its_authenticated_caller_or_none() -> None:
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(KeyRefused, match="Authorization: Bearer"):
            await find_caller(Request(scope))
        find_context(scope).caller = CALLER
        found.append(await find_caller(Request(scope)))

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request"}

    asyncio.run(with_context(app)({"type": "http", "method": "GET", "path": "/", "headers": []}, nothing, nothing))
    assert found == [CALLER]


def test_a_dependency_on_a_role_refuses_callers_without_it() -> None:
    dependency = require_role("publish").dependency
    assert asyncio.run(dependency(CALLER)) is CALLER
    with pytest.raises(RoleMissing, match="ci"):
        asyncio.run(require_role("admin").dependency(CALLER))


def test_routes_get_the_services_that_the_application_was_built_on() -> None:
    given = services()
    assert asyncio.run(find_services(request_from(HERE, app=build_api(given)))) is given


def test_roles_do_not_include_one_another() -> None:
    admin = Caller("acme", frozenset({"admin"}), "boss")
    assert asyncio.run(require_role("admin").dependency(admin)) is admin
    for role in ("infer", "publish"):
        with pytest.raises(RoleMissing, match=role):
            asyncio.run(require_role(role).dependency(admin))  # type: ignore[arg-type]


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
