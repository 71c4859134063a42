"""`/v1/models`: the names that a request may use as its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from deployments.api.adapters import Tag
from deployments.api.base import Passing, TolerantRequest, ignored_fields, problem, refuse_ignored
from deployments.api.pool_responses import ModelCard, model_list
from deployments.auth.authenticator import Caller
from deployments.config.served_model import ServedModel, ServedModels
from deployments.errors import ModelNotFound
from deployments.generation.planner import AUTO
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyCaller, AnyContext, AnyServices
from deployments.http.openapi import MODEL_ANSWERS, MODELS_ANSWERS
from deployments.http.routes.adapters import MAX_PAGE
from gpu_worker.front.request.request import SAMPLING_DEFAULTS
from lora_store import ROUTED_STRATEGIES, STRATEGIES, AdapterNotFound, AdapterRecord, NamedPolicy
from retriever_svc import WEIGHTINGS, PageRequest

router = APIRouter(route_class=AnsweringRoute)
_OWNER = "loraretriever"


class ModelQuery(TolerantRequest):
    """The query of one page of the list: names in order, `auto` and the base models first."""

    not_served: ClassVar[Passing] = {"before_id": ()}

    limit: int = Field(default=MAX_PAGE, ge=1, le=MAX_PAGE)
    after: str = Field(default="", max_length=256, description="the last id of the page before")
    after_id: str = Field(default="", max_length=256, description="Anthropic's spelling of `after`")
    owner: str | None = Field(default=None, max_length=64, description="only adapters of this tenant")
    tag: list[Tag] = Field(fail_fast=True, default=[], max_length=32, description="adapters that carry all of these")
    name: str = Field(default="", max_length=256, description="ids with this in them, in any case")

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.after and self.after_id:
            raise problem("after_id", "after is given too; keep one of them")
        self.after = self.after or self.after_id
        return self

    @property
    def is_counted(self) -> bool:
        """Whether the request counts against the key's rate: clients poll only the first page without a filter."""
        return bool(self.after or self.name or self.tag) or self.owner is not None


@router.get("/v1/models", response_model=None, responses=MODELS_ANSWERS)
async def models(
    query: Annotated[ModelQuery, Query()], services: AnyServices, caller: AnyCaller, context: AnyContext
) -> JSONResponse:
    """List `auto`, the base models, model names, then every adapter the caller may name.

    If `has_more`, go on `after` `last_id`.
    """
    if services.config.strict_fields:
        refuse_ignored(query)
    context.ignored = ignored_fields(query)
    if query.is_counted:
        services.authenticator.count_request(caller)
    cards = _Cards(services.config.served_models, services.completions.sampling_defaults, caller)
    own, is_inside = cards.own(query, await services.retriever.names(caller.tenant, is_short=True), caller.tenant)
    wanted = PageRequest(
        limit=max(query.limit - len(own), 0),
        after="" if is_inside else query.after,
        owner=query.owner,
        tags=tuple(query.tag),
        contains=query.name,
    )
    page = await services.retriever.page(caller.tenant, wanted)
    found = own[: query.limit] + [cards.adapter(name, record, caller.tenant) for name, record in page.rows]
    return JSONResponse(model_list(found, has_more=page.has_more or len(own) > query.limit))


@router.get("/v1/models/{model:path}", response_model=None, responses=MODEL_ANSWERS)
async def model(model: str, services: AnyServices, caller: AnyCaller) -> ModelCard:
    """Return the card of one model, by any name that a request may use for it."""
    if not model:  # a path that ends with the slash
        raise ModelNotFound(model)
    served = services.config.served_models
    cards = _Cards(served, services.completions.sampling_defaults, caller)
    base_model, name = served.split(model)
    if not name or name == AUTO:
        return cards.special(model)
    for policy in await services.retriever.policies(caller.tenant, name) if name == model else ():
        return cards.named(policy, caller.tenant)
    try:
        _, versions = await services.retriever.record(caller.tenant, name)
    except AdapterNotFound as exc:  # also matches the RayTaskError of it
        raise ModelNotFound(model, exc.hint) from exc
    pinned = name.partition("@")[2]  # "" is the live one
    record = next(version for version in versions if version.ref.digest.startswith(pinned))
    if served.bases.check(record, model) != base_model and base_model:
        raise ModelNotFound(model)
    return cards.adapter(model, record, caller.tenant)


class _Cards:
    """The cards of the models. Each has the template of its base model, and the defaults for sampling.

    `sampling_defaults`: the server's, before those of the base models.
    """

    def __init__(self, models: ServedModels, sampling_defaults: Mapping[str, float], caller: Caller) -> None:
        self._models, self._sampling_defaults, self._caller = models, sampling_defaults, caller

    def own(self, query: ModelQuery, named: Sequence[NamedPolicy], tenant: str) -> tuple[list[ModelCard], bool]:
        """Return the cards before those of adapters that belong to the page, and whether `after` is one of them.

        If the page has no room for all, there is one more than it has. Filters for adapters exclude them.
        """
        special = [AUTO, *(model.name for model in self._models)]
        ids = [*special, *(item.ref.name_for(tenant) for item in named)]
        is_inside = query.after in ids
        if query.owner is not None or query.tag or (query.after and not is_inside):
            return [], is_inside
        start = ids.index(query.after) + 1 if is_inside else 0
        found = [place for place in range(start, len(ids)) if query.name.lower() in ids[place].lower()]
        policies = [*[None] * len(special), *named]
        cards = []
        for place in found[: query.limit + 1]:
            policy = policies[place]
            cards.append(self.special(ids[place]) if policy is None else self.named(policy, tenant))
        return cards, is_inside

    def named(self, named: NamedPolicy, tenant: str) -> ModelCard:
        """Return the card of a model name. `root` is the version of its policy."""
        name = named.ref.name_for(tenant)
        target, template, given = _shown_fields(named.policy)
        root, created = f"{name}@{named.ref.short_digest}", int(named.created_at.timestamp())
        found = getattr(named, "base_model", "")  # a Retriever of an earlier version does not tell it
        is_served = any(found == model.name for model in self._models)  # not while models are added or removed
        model = self._models.by_name[found if is_served else self._models.split(target)[0]]
        card = self._card(name, created, named.ref.tenant, root, model, template)
        card["sampling_defaults"] |= given
        return card

    def special(self, name: str) -> ModelCard:
        """Return the card of `auto`, alone or for one base model, or of a base model."""
        base_model, rest = self._models.split(name)
        model = self._models.by_name[base_model]
        card = self._card(name, 0, _OWNER, name, model)
        if rest:
            strategies = {each: STRATEGIES[each].summary for each in ROUTED_STRATEGIES}
            weights = {each: weighting.summary for each, weighting in WEIGHTINGS.items()}
            return card | {"strategies": strategies, "weights": weights}
        card["parent"] = None
        accepted = sorted(model.accepted_names) if "publish" in self._caller.roles else []  # one may be a path
        return card | {"accepts_base": accepted} if accepted else card

    def adapter(self, name: str, record: AdapterRecord, tenant: str) -> ModelCard:
        """Return the card of an adapter. `root` is the source of the tenant's own; the others' stays private."""
        root = record.source if record.ref.tenant == tenant else name
        created = int(record.created_at.timestamp())
        model = self._models.made_for(record.base_model)
        return self._card(name, created, record.ref.tenant, root, model, record.template)

    def _card(
        self, name: str, created: int, owner: str, root: str, model: ServedModel, template: str | None = None
    ) -> ModelCard:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": owner,
            "root": root,
            "parent": model.name,
            "template": template or model.template_in_use,
            "sampling_defaults": {**model.sampling_defaults, **self._sampling_defaults},
        }


def _shown_fields(policy: str) -> tuple[str, str | None, Mapping[str, float]]:
    """Return what a card shows of a stored policy: its model, its template, and its defaults for sampling."""
    fields = json.loads(policy)
    return (
        fields.get("model", AUTO),
        fields.get("template"),
        {name: fields[name] for name in SAMPLING_DEFAULTS if name in fields},
    )
