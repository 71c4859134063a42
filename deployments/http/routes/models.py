"""`/v1/models`: the names that a request may use as its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Self

from fastapi import APIRouter, Query
from pydantic import Field

from deployments.api.adapters import Tag
from deployments.api.base import ApiRequest
from deployments.api.pool_responses import ModelCard, ModelList, model_list
from deployments.auth.authenticator import Caller
from deployments.config.served_model import ServedModel
from deployments.errors import ModelNotFound
from deployments.generation.planner import AUTO
from deployments.http.bodies import AnsweringRoute
from deployments.http.dependencies import AnyCaller, AnyServices
from deployments.http.openapi import MODEL_ANSWERS, MODELS_ANSWERS
from deployments.http.routes.adapters import MAX_PAGE
from gpu_worker.front.request.request import SAMPLING_DEFAULTS
from lora_store import ROUTED_STRATEGIES, STRATEGIES, AdapterNotFound, AdapterRecord, NamedPolicy
from retriever_svc import WEIGHTINGS, PageRequest

router = APIRouter(route_class=AnsweringRoute)
_OWNER = "loraretriever"
_MAX_READ = 1024  # policies whose fields are remembered; a list may have hundreds, and clients poll it


class ModelQuery(ApiRequest):
    """The query of one page of the list: names in order, `auto` and the base model first."""

    limit: int = Field(default=MAX_PAGE, ge=1, le=MAX_PAGE)
    after: str = Field(default="", max_length=256, description="the last id of the page before")
    owner: str | None = Field(default=None, max_length=64, description="only adapters of this tenant")
    tag: list[Tag] = Field(fail_fast=True, default=[], max_length=32, description="adapters that carry all of these")
    name: str = Field(default="", max_length=256, description="ids with this in them, in any case")


@router.get("/v1/models", response_model=None, responses=MODELS_ANSWERS)
async def models(query: Annotated[ModelQuery, Query()], services: AnyServices, caller: AnyCaller) -> ModelList:
    """List `auto`, the base model, model names, then every adapter the caller may name.

    If `has_more`, go on `after` `last_id`.
    """
    cards = _Cards.of(services.config.served_model, caller)
    own, is_inside = cards.own(query, await services.retriever.names(caller.tenant), caller.tenant)
    wanted = PageRequest(
        limit=max(query.limit - len(own), 0),
        after="" if is_inside else query.after,
        owner=query.owner,
        tags=tuple(query.tag),
        contains=query.name,
    )
    page = await services.retriever.page(caller.tenant, wanted)
    found = own[: query.limit] + [cards.adapter(name, record, caller.tenant) for name, record in page.rows]
    return model_list(found, has_more=page.has_more or len(own) > query.limit)


@router.get("/v1/models/{model:path}", response_model=None, responses=MODEL_ANSWERS)
async def model(model: str, services: AnyServices, caller: AnyCaller) -> ModelCard:
    """Return the card of one model, by any name that a request may use for it."""
    cards = _Cards.of(services.config.served_model, caller)
    name = model.removeprefix(f"{cards.base}:")
    if model == cards.base or name == AUTO:
        return cards.special(model)
    for policy in await services.retriever.policies(caller.tenant, name) if name == model else ():
        return cards.named(policy, caller.tenant)
    try:
        _, versions = await services.retriever.record(caller.tenant, name)
    except AdapterNotFound as exc:  # also matches the RayTaskError of it
        raise ModelNotFound(model, exc.hint) from exc
    services.config.served_model.bases.check(versions[0], model)
    return cards.adapter(model, versions[0], caller.tenant)


@dataclass(frozen=True, slots=True)
class _Cards:
    """The cards of the models over one base model, of which they have the template and the defaults for sampling."""

    base: str
    accepts_base: tuple[str, ...]  # for callers who publish: one of the names may be a path on the server
    template: str
    sampling_defaults: dict[str, float]

    @classmethod
    def of(cls, model: ServedModel, caller: Caller) -> Self:
        accepted = tuple(sorted(model.accepted_names)) if "publish" in caller.roles else ()
        return cls(model.name, accepted, model.template_in_use, model.sampling_defaults)

    def own(self, query: ModelQuery, named: Sequence[NamedPolicy], tenant: str) -> tuple[list[ModelCard], bool]:
        """Return the cards before those of adapters that belong to the page, and whether `after` is one of them.

        If the page has no room for all, there is one more than it has. Filters for adapters exclude them.
        """
        ids = [AUTO, self.base, *(item.ref.name_for(tenant) for item in named)]
        is_inside = query.after in ids
        if query.owner is not None or query.tag or (query.after and not is_inside):
            return [], is_inside
        start = ids.index(query.after) + 1 if is_inside else 0
        found = [place for place in range(start, len(ids)) if query.name.lower() in ids[place].lower()]
        policies = [None, None, *named]
        cards = []
        for place in found[: query.limit + 1]:
            policy = policies[place]
            cards.append(self.special(ids[place]) if policy is None else self.named(policy, tenant))
        return cards, is_inside

    def named(self, named: NamedPolicy, tenant: str) -> ModelCard:
        """Return the card of a model name. `root` is the version of its policy."""
        name = named.ref.name_for(tenant)
        template, given = _shown_fields(named.policy)
        root, created = f"{name}@{named.ref.digest[:12]}", int(named.created_at.timestamp())
        card = self._card(name, created, named.ref.tenant, root, self.base, template or self.template)
        card["sampling_defaults"] = {**self.sampling_defaults, **given}
        return card

    def special(self, name: str) -> ModelCard:
        """Return the card of `auto` or of the base model."""
        if name != self.base:
            card = self._card(name, 0, _OWNER, name, self.base, self.template)
            strategies = {each: STRATEGIES[each].summary for each in ROUTED_STRATEGIES}
            weights = {each: weighting.summary for each, weighting in WEIGHTINGS.items()}
            return card | {"strategies": strategies, "weights": weights}
        card = self._card(name, 0, _OWNER, name, None, self.template)
        return card | {"accepts_base": list(self.accepts_base)} if self.accepts_base else card

    def adapter(self, name: str, record: AdapterRecord, tenant: str) -> ModelCard:
        """Return the card of an adapter. `root` is the source of the tenant's own; the others' stays private."""
        root = record.source if record.ref.tenant == tenant else name
        created = int(record.created_at.timestamp())
        return self._card(name, created, record.ref.tenant, root, self.base, record.template or self.template)

    def _card(self, name: str, created: int, owner: str, root: str, parent: str | None, template: str) -> ModelCard:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": owner,
            "root": root,
            "parent": parent,
            "template": template,
            "sampling_defaults": self.sampling_defaults,
        }


@lru_cache(_MAX_READ)
def _shown_fields(policy: str) -> tuple[str | None, Mapping[str, float]]:
    """Return what a card shows of a stored policy: its template, and its defaults for sampling."""
    fields = json.loads(policy)
    return fields.get("template"), {name: fields[name] for name in SAMPLING_DEFAULTS if name in fields}
