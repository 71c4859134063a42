"""`/v1/loras`: list, show, publish, withdraw and change adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from deployments.api import error_table
from deployments.api.adapters import (
    MAX_TAG_CHARS,
    MAX_TAGS,
    MAX_TTL_S,
    MAX_UPLOAD_FILES,
    AdapterSource,
    ApproveRequest,
    EditRequest,
    PublishBatch,
    PublishItem,
    RollbackRequest,
    SamplesRequest,
    ShareRequest,
    Tag,
)
from deployments.api.draws_report import draws_object
from deployments.api.pool_responses import AdapterShown, adapter_list, shown_object
from deployments.api.responses import (
    Published,
    SamplesChanged,
    Settled,
    batch_object,
    choose_status,
    published_object,
    replicas_object,
    trial_object,
)
from deployments.auth.authenticator import Caller
from deployments.errors import RequestInvalid, RoleMissing, VersionChanged
from deployments.http.bodies import FORM, AnsweringRoute, content_kind
from deployments.http.dependencies import (
    MAY_CHANGE,
    AdminCaller,
    AnyCaller,
    AnyServices,
    PublishCaller,
    Services,
    make_item,
    own_key,
    require_approver,
)
from deployments.http.openapi import (
    APPROVE_ANSWERS,
    EDIT_ANSWERS,
    LORA_ANSWERS,
    LORAS_ANSWERS,
    PUBLISH_ANSWERS,
    ROLLBACK_ANSWERS,
    SAMPLES_ANSWERS,
    SHARE_ANSWERS,
    WITHDRAW_ANSWERS,
)
from deployments.http.uploads import count_upload, read_upload
from deployments.publishing.validator import Charge
from lora_store import VISIBILITIES, Feedback
from lora_store.contract_files import MAX_CONTRACT_BYTES
from retriever_svc import PageRequest
from retriever_svc.listing import Sort
from retriever_svc.shared_wording import choose_varied

router = APIRouter(route_class=AnsweringRoute)
MAX_PAGE = 1000
MAX_SHOWN_SAMPLES = 200
_LORAS = "/v1/loras"

_FORM = {
    "type": "object",
    "required": ["files", "name"],
    "properties": {
        "files": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": MAX_UPLOAD_FILES},
        "name": {"type": "string", "maxLength": 64},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": MAX_TAG_CHARS}, "maxItems": MAX_TAGS},
        "template": {"type": "string", "enum": ["alpaca", "chat", "server"]},
        "contract": {"type": "string", "maxLength": 2 * MAX_CONTRACT_BYTES},
        "samples": {"type": "string", "enum": [""]},
        "visibility": {"type": "string", "enum": list(VISIBILITIES)},
        "ttl_s": {"type": "number", "minimum": 1, "maximum": MAX_TTL_S},
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "shadow": {"type": "boolean"},
        "base_model": {"type": "string", "maxLength": 4096},
    },
}
_ONE, _MANY = AdapterSource.model_json_schema(), PublishBatch.model_json_schema()
_MANY["properties"]["adapters"]["items"] = _ONE  # instead of a reference, which would leave the document
_JSON = {"anyOf": [_ONE, {name: value for name, value in _MANY.items() if name != "$defs"}]}
_BODY = {FORM: {"schema": _FORM}, "application/json": {"schema": _JSON}}


@router.get(_LORAS, response_model=None, responses=LORAS_ANSWERS)
async def loras(
    services: AnyServices,
    caller: AnyCaller,
    search: Annotated[str, Query(max_length=256)] = "",
    tag: Annotated[list[Tag] | None, Query(max_length=MAX_TAGS, description="has all of these tags")] = None,
    owner: Annotated[str | None, Query(max_length=64, description="belongs to this tenant")] = None,
    base: Annotated[str | None, Query(max_length=4096, description="names this base model")] = None,
    sort: Annotated[Sort, Query(description="newest and oldest: by the time of publish")] = "name",
    after: Annotated[str, Query(max_length=256, description="the last id of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    min_generation: Annotated[int, Query(ge=0, lt=2**63)] = 0,
) -> JSONResponse:
    """Return a page of the adapters that the caller may use and that pass the filters, and their number."""
    wanted = PageRequest(limit, after, owner=owner, base=base, tags=tuple(tag or ()), words=search, sort=sort)
    page = await services.retriever.page(caller.tenant, wanted, min_generation)
    return JSONResponse(adapter_list(page, caller.tenant))


@router.post(
    _LORAS,
    status_code=201,
    responses=PUBLISH_ANSWERS,
    dependencies=[MAY_CHANGE],
    openapi_extra={"requestBody": {"required": True, "content": _BODY}},
)
async def publish(
    caller: PublishCaller,
    services: AnyServices,
    http: Request,
    dry_run: Annotated[bool, Query(description="check everything and publish nothing")] = False,
) -> JSONResponse:
    """Publish uploaded files, a server folder, a source URI, or a batch of the latter two in one commit.

    201 when every Retriever replica routes to it, 202 while one is behind, 207 when a part of a batch failed. With
    `dry_run` 200: the adapter is fit to publish, and nothing is live or stored.
    """
    kind = content_kind(http.scope)
    if kind == FORM:
        return await _publish_files(services, caller, http, is_dry=dry_run)
    if kind != "application/json":
        raise RequestInvalid(f"content-type must be application/json or multipart/form-data, got {kind[:100]!r}")
    body = _parse(await http.json())
    if isinstance(body, AdapterSource):
        return await _publish_one(services, caller, make_item(services, body.upload(), caller, http), is_dry=dry_run)
    items = [make_item(services, adapter.upload(), caller, http) for adapter in body.adapters]
    _check_names(items)
    outcomes = await publish_items(services, caller, items, is_dry=dry_run)
    answer = batch_object(outcomes)
    failed = any(isinstance(outcome, Exception) for outcome in outcomes)
    return JSONResponse(answer, 207 if failed else max(item["status"] for item in answer["data"]))


@router.get("/v1/loras/{name:path}", response_model=None, responses=LORA_ANSWERS)
async def show(
    name: str,
    services: AnyServices,
    caller: AnyCaller,
    samples: Annotated[int, Query(ge=0, le=MAX_SHOWN_SAMPLES, description="how many samples to include")] = 0,
    varied: Annotated[bool, Query(description="choose samples that differ most in their words")] = False,
    evaluation: Annotated[bool, Query(description="include what the last evaluation measured")] = False,
    proposed: Annotated[bool, Query(description="include prompts that may become samples; role publish")] = False,
) -> AdapterShown:
    """Return one adapter and its kept versions, the live one first.

    With `samples` also this many samples of the live version, the first ones or `varied` ones. Other tenants' adapters
    show none. With `evaluation` what the tenant's last evaluation measured on the examples of the live version.
    """
    generation, versions = await services.retriever.record(caller.tenant, name)
    # Older samples than those of this version would overwrite newer ones if a client edits them.
    found = await services.retriever.samples(caller.tenant, name, generation) if samples else []
    places = choose_varied([sample.input for sample in found], samples) if varied else range(len(found))[:samples]
    measured = await services.retriever.evaluation(caller.tenant, name) if evaluation else None
    waiting: list[Feedback] = []
    if proposed:
        if "publish" not in caller.roles:
            raise RoleMissing(caller.key_id, "publish")
        async with own_key(name, caller, services) as (tenant, bare):
            waiting = await services.store.feedback(tenant, "proposed", bare)
    return shown_object(versions, caller.tenant, generation, [found[place] for place in places], waiting, measured)


@router.post("/v1/loras/{name:path}/samples", response_model=None, responses=SAMPLES_ANSWERS, dependencies=[MAY_CHANGE])
async def change_samples(name: str, body: SamplesRequest, caller: PublishCaller, services: AnyServices) -> JSONResponse:
    """Accept prompts of clients as samples, which makes a new version; reject them; or take the accepted ones out."""
    charge, learning = charge_to(services, caller), services.learning
    left_out: list[str] = []
    async with own_key(name, caller, services) as key:
        if body.action == "reject":
            num = await learning.reject(key, body.ids)
            return JSONResponse({"name": key[1], "action": body.action, "num_rejected": num})
        if body.action == "accept":
            published, left_out = await learning.accept(key, body.ids, caller.key_id, charge)
        else:
            published = await learning.undo(key, caller.key_id, charge)
    answer: SamplesChanged = {
        "name": key[1],
        "action": body.action,
        "left_out": left_out,
        "digest": published.ref.digest,
        "generation": published.generation,
        "replicas": replicas_object(published),
    }
    return JSONResponse(answer, choose_status(published))


@router.delete("/v1/loras/{name:path}", responses=WITHDRAW_ANSWERS, dependencies=[MAY_CHANGE])
async def withdraw(name: str, caller: PublishCaller, services: AnyServices) -> JSONResponse:
    """Remove the adapter and all its versions from the pool. Running requests finish with the version they use."""
    async with own_key(name, caller, services) as (tenant, bare):
        settled = await services.publisher.withdraw(tenant, [bare], caller.key_id)
    return answer_settled(settled, names=[bare], deleted=True)


@router.post("/v1/loras/{name:path}/rollback", status_code=201, responses=ROLLBACK_ANSWERS, dependencies=[MAY_CHANGE])
async def rollback(name: str, body: RollbackRequest, caller: PublishCaller, services: AnyServices) -> JSONResponse:
    """Publish a kept version again: the one before the live one, or the one that `digest` names."""
    charge = charge_to(services, caller)
    async with own_key(name, caller, services) as key:
        published = await services.publisher.rollback(key, body.digest, caller.key_id, charge)
    return JSONResponse(published_object(published), choose_status(published))


@router.post("/v1/loras/{name:path}/share", response_model=None, responses=SHARE_ANSWERS, dependencies=[MAY_CHANGE])
async def share(name: str, body: ShareRequest, caller: PublishCaller, services: AnyServices) -> JSONResponse:
    """Let a kept version answer a share of the requests to its name, or a copy of them; a share of 0 ends that."""
    async with own_key(name, caller, services) as key:
        trial, settled = await services.publisher.set_trial(
            key, body.digest, body.share, caller.key_id, is_shadow=body.shadow
        )
    return answer_settled(settled, name=key[1], trial=None if trial is None else trial_object(trial))


@router.patch("/v1/loras/{name:path}", response_model=None, responses=EDIT_ANSWERS, dependencies=[MAY_CHANGE])
async def edit(name: str, body: EditRequest, caller: PublishCaller, services: AnyServices) -> JSONResponse:
    """Change the visibility, or tags, template, samples or contract, which makes a new version of the same weights.

    A public adapter claims its bare name: 409 if another tenant has it, and also if `digest` is not the live version's.
    """
    publisher, quota = services.publisher, caller.limits.tenant_quota
    async with own_key(name, caller, services) as key:
        if body.visibility is not None and not body.makes_version and body.digest is None:
            settled = await publisher.set_visibility(key, body.visibility, caller.key_id)
            return answer_settled(settled, name=key[1], visibility=body.visibility)
        charge = charge_to(services, caller)
        published = await publisher.edit(key, body.edit(), body.digest, caller.key_id, quota, charge)
    return JSONResponse(published_object(published), choose_status(published))


@router.post("/v1/loras/{name:path}/approve", response_model=None, responses=APPROVE_ANSWERS, dependencies=[MAY_CHANGE])
async def approve(
    name: str,
    body: ApproveRequest,
    caller: AdminCaller,
    services: AnyServices,
    dry_run: Annotated[bool, Query(description="check and measure everything, and approve nothing")] = False,
) -> JSONResponse:
    """Let `auto` choose this version of a public adapter for every tenant. 409 if another version is live by now.

    The answer's `draws` say which prompts of other tenants it then answers first. 400 if these are many, unless the
    approver confirms it.
    """
    if "@" in name:
        raise RequestInvalid(
            "name: give it without a version; `digest` names the version, which must be the live one", "name"
        )
    generation, versions = await services.retriever.record(caller.tenant, name)
    record = versions[0]
    if record.ref.digest != body.digest:
        raise VersionChanged(name, body.digest, record.ref.digest)
    if record.visibility != "public":
        raise RequestInvalid("name: only a public adapter can be approved; make it public first", "name")
    require_approver(services, record.ref, caller)
    version = f"{record.ref.tenant}/{record.ref.name}@{record.ref.digest}"
    measured = await services.retriever.draws(caller.tenant, version, generation)
    draws = draws_object(measured, record.ref, caller.tenant)
    about = {"digest": record.ref.digest, "approved": record.approved or not dry_run, "draws": draws}
    if dry_run:
        return answer_settled(Settled(generation, 0, 0), name=record.ref.name, **about)
    if draws["needs_confirmation"] and not body.confirmed:
        raise RequestInvalid(f"confirmed: must be true to approve this version. {draws['text']}", "confirmed")
    settled = await services.publisher.approve([record.ref], caller.key_id)
    return answer_settled(settled, name=record.ref.name, **about)


def answer_settled(settled: Settled, **about: object) -> JSONResponse:
    """Return the answer to a change. `about`: of what, and what it set."""
    answer = {**about, "generation": settled.generation, "replicas": replicas_object(settled)}
    return JSONResponse(answer, 202 if settled.behind else 200)


def charge_to(services: Services, caller: Caller) -> Charge:
    """Return a function that charges the caller's key for the samples that the encoder reads during a publish."""
    return partial(services.authenticator.charge, caller, field="samples")


async def publish_items(
    services: Services,
    caller: Caller,
    items: Sequence[PublishItem],
    held: AbstractContextManager[object] | None = None,
    *,
    is_dry: bool = False,
) -> Sequence[Published | Exception]:
    """Publish `items` in one commit, within the quota of the caller's tenant. Return one outcome per item.

    `held` is left when they are published or refused, even if the client has left before.
    """
    return await services.publisher.publish(items, caller.key_id, charge_to(services, caller), held, is_dry=is_dry)


async def _publish_files(services: Services, caller: Caller, http: Request, *, is_dry: bool) -> JSONResponse:
    """Publish an upload. It counts against the budget until it is published, even if the client has left before."""
    sent: list[str] = []
    with ExitStack() as stack:
        body = stack.enter_context(count_upload(http, caller.tenant, services.uploads))
        try:
            item = make_item(services, await read_upload(body, services.store.put_part, sent), caller, http)
        except BaseException:
            if sent:
                services.background.start(services.store.delete_parts(sent), "deleting the parts of a failed upload")
            raise
        held = stack.pop_all()
    return await _publish_one(services, caller, item, held, is_dry=is_dry)


async def _publish_one(
    services: Services,
    caller: Caller,
    item: PublishItem,
    held: AbstractContextManager[object] | None = None,
    *,
    is_dry: bool,
) -> JSONResponse:
    [outcome] = await publish_items(services, caller, [item], held, is_dry=is_dry)
    if isinstance(outcome, Exception):
        raise outcome
    return JSONResponse(published_object(outcome), choose_status(outcome))


def _check_names(items: Sequence[PublishItem]) -> None:
    """Refuse several places under one name: of these only the last one would stay live. Raises: RequestInvalid."""
    places: dict[str, str] = {}
    for number, item in enumerate(items):
        name, place = item.adapter_name, str(item.path or item.source).rstrip("/")
        other = places.setdefault(name, place)
        if other != place:
            param = f"adapters.{number}.name"
            text = f"{name[:100]!r} is also the name of {other[:200]!r}; give {place[:200]!r} another one"
            raise RequestInvalid(f"{param}: {text}", param)


def _parse(data: object) -> AdapterSource | PublishBatch:
    """Parse a publish request of one item or a batch. Raises: RequestInvalid."""
    try:
        if isinstance(data, dict) and "adapters" in data:
            return PublishBatch.model_validate(data)
        return AdapterSource.model_validate(data)
    except ValidationError as exc:
        raise error_table.validation_error(exc) from exc
