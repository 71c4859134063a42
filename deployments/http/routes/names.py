"""`/v1/names`: model names that stand for a policy."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from deployments.api.adapters import RollbackRequest
from deployments.api.names import (
    ApproveNameRequest,
    NameList,
    NamePolicy,
    NameShown,
    name_object,
    parse_policy,
    version_object,
)
from deployments.api.responses import Settled
from deployments.auth.authenticator import Caller
from deployments.errors import ModelNotFound, RequestInvalid, VersionNotKept
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import (
    MAY_CHANGE,
    AdminCaller,
    AnyCaller,
    AnyServices,
    PublishCaller,
    Services,
    require_approver,
)
from deployments.http.openapi import NAME_ANSWERS, NAMES_ANSWERS, SETTLED_NAME_ANSWERS
from deployments.http.routes.adapters import answer_settled
from gpu_worker.errors import GrammarInvalid
from gpu_worker.front.fair_threads import FairThreads
from gpu_worker.front.grammar.compiler import CheckProcess
from gpu_worker.front.request.grammar import Grammar
from lora_store import (
    KEPT_POLICIES,
    MAX_POLICY_CHARS,
    AdapterNotFound,
    Key,
    NamedPolicy,
    NameTaken,
    is_valid_name,
    policy_digest,
)
from lora_store.validation import NO_CHAT_TEMPLATE, lacks_chat_template

router = APIRouter(route_class=AnsweringRoute)
_NAMES, _NAME = "/v1/names", "/v1/names/{name:path}"
_CHECKS = FairThreads(
    "policy-check", num_threads=1, max_calls=64, full="too many policies are being checked; retry later"
)
_MAX_PAGE = 64  # names, of which each may have a policy of 16 kB
MinGeneration = Annotated[int, Query(ge=0, lt=2**63)]


@router.get(_NAMES, response_model=None, responses=NAMES_ANSWERS)
async def names(
    services: AnyServices,
    caller: AnyCaller,
    min_generation: MinGeneration = 0,
    after: Annotated[str, Query(max_length=256, description="the last id of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
) -> NameList:
    """Return a page of the model names that the caller may use: its own, then those approved for every tenant."""
    found = await services.retriever.names(caller.tenant, min_generation, after, limit + 1)
    rows = [name_object(named, caller.tenant) for named in found[:limit]]
    last_id = rows[-1]["id"] if rows else None
    return {"object": "list", "data": rows, "last_id": last_id, "has_more": len(found) > limit}


@router.put(_NAME, response_model=None, responses=SETTLED_NAME_ANSWERS, dependencies=[MAY_CHANGE])
async def set_name(name: str, body: NamePolicy, caller: PublishCaller, services: AnyServices) -> JSONResponse:
    """Let a model name stand for this policy. Every request gets the old policy or the new one, and none fails.

    200 when every Retriever replica answers by it, 202 while one is behind.
    """
    key = _own_key(name, caller)
    if not is_valid_name(key[1]):
        raise RequestInvalid(f"name: 1 to 64 of A-Z a-z 0-9 . _ - and not 'auto', got {name[:100]!r}", "name")
    if key[1] in services.config.served_models.accepted_names:
        raise NameTaken(key[1], "the base model")
    bases = services.config.served_models
    for policy in body.both:
        if all(lacks_chat_template(policy.template, base.known_templates) for base in bases):
            raise RequestInvalid(NO_CHAT_TEMPLATE, "template")
    settled = await services.planner.add_owners(body, caller.tenant)
    grammars = [policy.sampling().grammar for policy in settled.both]
    text = settled.to_json()
    if len(text) > MAX_POLICY_CHARS:
        raise RequestInvalid(f"the policy has {len(text)} characters; at most {MAX_POLICY_CHARS} are kept")
    for grammar in grammars:
        if grammar is not None:
            await _check_grammar(grammar, caller.tenant)
    return await _set(services, key, text, caller)


@router.get(_NAME, response_model=None, responses=NAME_ANSWERS)
async def show_name(
    name: str, services: AnyServices, caller: AnyCaller, min_generation: MinGeneration = 0
) -> NameShown:
    """Return a model name with its policy, and its kept versions, the newest first."""
    kept = await _kept(name, caller.tenant, services, min_generation)
    return {**name_object(kept[0], caller.tenant), "versions": [version_object(item, caller.tenant) for item in kept]}


@router.post(_NAME + "/rollback", response_model=None, responses=SETTLED_NAME_ANSWERS, dependencies=[MAY_CHANGE])
async def roll_back_name(
    name: str, body: RollbackRequest, caller: PublishCaller, services: AnyServices
) -> JSONResponse:
    """Make a kept policy the newest again: the one before, or the one whose digest starts with `digest`."""
    key = _own_key(name, caller)
    kept = await _kept(key[1], caller.tenant, services)
    wanted = body.digest
    found = kept[1:2] if wanted is None else [item for item in kept if item.ref.digest.startswith(wanted)]
    if len(found) != 1:
        raise VersionNotKept(key[1], wanted, [item.ref.digest for item in kept], "model name")
    return await _set(services, key, found[0].policy, caller)


@router.post(_NAME + "/approve", response_model=None, responses=SETTLED_NAME_ANSWERS, dependencies=[MAY_CHANGE])
async def approve_name(
    name: str,
    body: ApproveNameRequest,
    caller: AdminCaller,
    services: AnyServices,
    dry_run: Annotated[bool, Query(description="show the policy, and approve nothing")] = False,
) -> JSONResponse:
    """Let every tenant use this version of `owner/name`. Each still gets only adapters that it may use itself."""
    owner, _, bare = name.rpartition("/")
    owner = owner or caller.tenant
    found = await services.retriever.policies(owner, f"{owner}/{bare}@{body.digest}")
    if not found:
        raise ModelNotFound(f"{name}@{body.digest[:12]}", is_policy=True)
    require_approver(services, found[0].ref, caller)
    await _require_public(found[0], services)
    shown = version_object(found[0], caller.tenant)
    about = {"digest": body.digest, "approved": not dry_run, "policy": shown["policy"]}
    if dry_run:
        return answer_settled(Settled(0, 0, 0), name=name, **about)
    try:
        settled = await services.publisher.change_name(partial(services.store.approve_name, found[0].ref))
    except AdapterNotFound as exc:
        raise ModelNotFound(name, is_policy=True) from exc
    return answer_settled(settled, name=name, **about)


@router.delete(_NAME, response_model=None, responses=SETTLED_NAME_ANSWERS, dependencies=[MAY_CHANGE])
async def remove_name(name: str, caller: PublishCaller, services: AnyServices) -> JSONResponse:
    """Remove a model name with its versions. Requests to it are then answered 404; running ones finish."""
    key = _own_key(name, caller)
    try:
        settled = await services.publisher.change_name(partial(services.store.set_name, key, "", caller.key_id))
    except AdapterNotFound as exc:
        raise ModelNotFound(name, is_policy=True) from exc
    return answer_settled(settled, name=key[1])


def _own_key(name: str, caller: Caller) -> Key:
    """Return (tenant, name) of a name of the caller's tenant. Raises: ModelNotFound for another tenant's."""
    owner, slash, bare = name.rpartition("/")
    if slash and owner != caller.tenant:
        raise ModelNotFound(name, is_policy=True)
    return caller.tenant, bare


async def _kept(name: str, tenant: str, services: Services, min_generation: int = 0) -> list[NamedPolicy]:
    """Return the kept versions of a name. Raises: ModelNotFound, StaleIndex."""
    kept = await services.retriever.policies(tenant, name, min_generation, KEPT_POLICIES)
    if not kept:
        raise ModelNotFound(name, is_policy=True)
    return kept


async def _check_grammar(grammar: Grammar, tenant: str) -> None:
    """Raises: GrammarInvalid if no answer can follow it; EngineFull if it cannot be checked now."""
    try:
        await asyncio.wrap_future(_CHECKS.submit(tenant, partial(CheckProcess().run, grammar)))
    except GrammarInvalid as exc:
        raise GrammarInvalid(exc.message, exc.pointer, grammar.param) from exc


async def _set(services: Services, key: Key, policy: str, caller: Caller) -> JSONResponse:
    settled = await services.publisher.change_name(partial(services.store.set_name, key, policy, caller.key_id))
    return answer_settled(settled, name=key[1], digest=policy_digest(policy))


async def _require_public(named: NamedPolicy, services: Services) -> None:
    """Raises: RequestInvalid if the policy names an adapter that other tenants may not use."""
    for wanted in parse_policy(named.policy).adapter_names:
        _, versions = await services.retriever.record(named.ref.tenant, wanted)
        pinned = wanted.partition("@")[2]  # an older version may be private; "" is the live one
        found = [record for record in versions if record.ref.digest.startswith(pinned)]
        if not found or found[0].visibility != "public":
            raise RequestInvalid(f"name: its policy names {wanted!r}, which is private; make it public first", "name")
