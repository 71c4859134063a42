"""`/v1/names`: the policies of model names. A policy holds fields of a request, which requests to the name get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal, NotRequired, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError
from typing_extensions import TypedDict

from deployments.api import error_table
from deployments.api.base import ApiRequest, LoraOptions, problem
from deployments.api.completions import ChatCompletionRequest, GenerationRequest, PolicyFields, Question
from deployments.api.responses import Planned
from deployments.errors import RequestInvalid
from deployments.json_types import JsonObject
from gpu_worker.front.request.request import SamplingParams
from lora_store import NamedPolicy

R = TypeVar("R", bound=GenerationRequest)
_OF_ONE_REQUEST = ("query", "plan", "min_generation", "explain")  # fields of `lora`
_REPLACES = {  # the field of the policy that goes with another one of it, by the field of the request
    "abstain": "min_score",
    "min_score": "abstain",
    "strategy": "strategy_options",
    "response_format": "structured_outputs",
    "structured_outputs": "response_format",
}
_LEAST_REQUEST = {"messages": [{"role": "user", "content": "Hi"}]}
_DRAWN_BITS = 64


class _Policy(PolicyFields):
    template: Literal["alpaca", "chat"] | None = None
    """The prompt template of chats. Default: that of the adapters, else the server's."""

    @model_validator(mode="after")
    def _for_every_request(self) -> Self:
        for field in _OF_ONE_REQUEST:
            if field in self.lora.model_fields_set:
                raise problem(f"lora.{field}", "belongs to a single request; leave it out of the policy")
        return self

    def sampling(self) -> SamplingParams:
        """Return the sampling of a request that sets nothing itself. Raises: SamplingInvalid, GrammarInvalid."""
        return AppliedPolicy(self, "").apply_to_request(ChatCompletionRequest.model_validate(_LEAST_REQUEST)).sampling()


class Variant(_Policy):
    """Another policy for a share of the conversations."""

    share: float = Field(gt=0, lt=1)
    """The share of the conversations, above 0 and below 1. One that begins alike always gets the same policy."""


class NamePolicy(_Policy):
    """`PUT /v1/names/{name}`: what requests to this model name get, unless they set it themselves."""

    variant: Variant | None = None
    """A second policy for a `share` of the conversations, with the same fields."""

    def to_json(self) -> str:
        """Return the fields that are set, always in the same order. Raises: RequestInvalid."""
        try:
            return self.model_dump_json(exclude_unset=True, by_alias=True)
        except PydanticSerializationError as exc:
            raise RequestInvalid(
                "the policy is nested too deeply, or has text that is not Unicode; flatten its JSON schema, or remove"
                " lone surrogates such as \\ud800"
            ) from exc

    @property
    def both(self) -> list[_Policy]:
        """This policy and its variant, if it has one."""
        return [self] if self.variant is None else [self, self.variant]

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that it names, as `owner/name`."""
        named = [choice.name for policy in self.both for choice in policy.lora.adapters or ()]
        return named + [policy.model for policy in self.both if "/" in policy.model]

    def chosen(self, question: Question, salt: str) -> _Policy:
        """Return the variant for its share of the conversations, this policy for the others."""
        if self.variant is None:
            return self
        drawn = hashlib.sha256(f"{salt}\0{_opening(question)}".encode(errors="surrogatepass")).digest()
        number = int.from_bytes(drawn[: _DRAWN_BITS // 8], "big")
        return self.variant if number < self.variant.share * 2**_DRAWN_BITS else self


def _opening(question: Question) -> str:
    """Return the conversation up to its first user message, which all its requests share."""
    if not isinstance(question.prompt, tuple):
        return str(question.prompt)
    first = next((place for place, turn in enumerate(question.prompt) if turn.role == "user"), 0)
    return "\0".join(turn.content for turn in question.prompt[: first + 1])


def parse_policy(text: str) -> NamePolicy:
    """Return a stored policy. Raises: RequestInvalid for one that only a newer release can read."""
    try:
        return NamePolicy.model_validate_json(text)
    except ValidationError as exc:
        raise RequestInvalid(f"model: its policy is of a newer release: {error_table.validation_error(exc)}") from exc


class ApproveNameRequest(ApiRequest):
    """`POST /v1/names/{name}/approve`: the version that was reviewed."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="the whole `digest` that GET /v1/names/{name} shows")


@dataclass(frozen=True, slots=True)
class AppliedPolicy:
    """The policy that answers one request to a model name. `shown`: the name with the version of the policy."""

    policy: _Policy
    shown: str

    @classmethod
    def of(cls, named: NamedPolicy, question: Question, tenant: str) -> Self:
        """Return the policy for a request with this first question. Raises: RequestInvalid."""
        whole = parse_policy(named.policy)
        policy = whole.chosen(question, f"{named.ref.tenant}/{named.ref.name}")
        shown = f"{named.ref.name_for(tenant)}@{named.ref.short_digest}"
        return cls(policy, shown if policy is whole else f"{shown} (variant)")

    def apply_to_request(self, request: R) -> R:
        """Return the request with the policy's fields where it sets none of its own.

        A request that names adapters or sends a plan takes none of the policy's `lora`.
        """
        given = request.set_fields
        names_adapters = request.merged_adapters or "lora_path" in given
        lora = request.lora if names_adapters else self._options(request.lora)
        own = {*given, "model", "lora", "template", "variant", "share", *self._find_conflicts(request)}
        return _filled(request, self.policy, own).model_copy(update={"lora": lora})

    def _find_conflicts(self, request: GenerationRequest) -> Set[str]:
        """Return the policy's fields that would make the request itself invalid.

        A grammar ends an answer, and so does its limit. A stop may cut calls, and what a grammar allows.
        """
        tools, limit, policy_limit = request.used_tools(), request.token_limit, self.policy.max_tokens
        has_format = request.sampling().grammar is not None
        conflicts: set[str] = {"stop"} if has_format or tools is not None else set()
        structured = self.policy.structured_outputs
        if tools is not None and structured is not None and structured.as_grammar().kind != "json_schema":
            conflicts.add("structured_outputs")
        if has_format or (tools is not None and tools.have_grammar):
            conflicts |= {"min_tokens", "ignore_eos"}
        elif request.min_tokens or request.ignore_eos:
            conflicts |= {"response_format", "structured_outputs"}
        if limit is not None and limit < self.policy.min_tokens:
            conflicts.add("min_tokens")
        if policy_limit is not None and policy_limit < request.min_tokens:
            conflicts.add("max_tokens")
        return conflicts

    def apply_to_question(self, question: Question) -> Question:
        """Return the question with the policy's model, and with its options where it sets none."""
        return replace(question, model=self._model(question), lora=self._options(question.lora))

    def _options(self, own: LoraOptions) -> LoraOptions:
        return own if own.names_adapters else _filled(own, self.policy.lora, own.model_fields_set)

    def make_questions(self, filled: GenerationRequest) -> list[Question]:
        """Return the questions of a request that was filled."""
        return [replace(question, model=self._model(question)) for question in filled.questions()]

    def _model(self, question: Question) -> str:
        """Return the policy's model; for a request that names adapters or sends a plan only its base model, if any."""
        model = self.policy.model
        if question.lora.names_adapters is None or model.rpartition(":")[2] == "auto":
            return model
        return "auto" if "/" in model else f"{model}:auto"

    def explain(self, plans: Sequence[Planned]) -> list[Planned]:
        """Return the plans with the policy's template and the version of the name."""
        template = self.policy.template
        return [
            replace(
                planned,
                plan=planned.plan if template is None else replace(planned.plan, template=template),
                policy=self.shown,
            )
            for planned in plans
        ]


M = TypeVar("M", bound=ApiRequest)


def _filled(own: M, policy: ApiRequest, given: Set[str]) -> M:
    """Return `own` with the fields that the policy sets, without those in `given`."""
    taken = given | {_REPLACES[name] for name in given if name in _REPLACES}
    found = {name: getattr(policy, name) for name in policy.model_fields_set - taken}
    return own.model_copy(update=found) if found else own


class NameVersion(TypedDict):
    """One version of a name. `approved`: every tenant may use it."""

    digest: str
    approved: bool
    actor: str
    created_at: str
    policy: JsonObject


class NameShown(NameVersion):
    """A model name with its newest policy. `versions`: the kept ones, newest first, if one name was asked for."""

    id: str
    object: Literal["name"]
    owner: str
    versions: NotRequired[list[NameVersion]]


class NameList(TypedDict):
    """One page. If `has_more`, continue `after` the `last_id`."""

    object: Literal["list"]
    data: list[NameShown]
    last_id: str | None
    has_more: bool


def name_object(named: NamedPolicy, tenant: str) -> NameShown:
    """Return a model name, and the adapters of its policy, under the names that `tenant` uses."""
    version = version_object(named, tenant)
    return {**version, "id": named.ref.name_for(tenant), "object": "name", "owner": named.ref.tenant}  # type: ignore[typeddict-item]  # no `versions`


def version_object(named: NamedPolicy, tenant: str) -> NameVersion:
    """Return one version of a name. Other tenants do not see who set it."""
    return {
        "digest": named.ref.digest,
        "approved": named.approved,
        "actor": named.actor if named.ref.tenant == tenant else "",
        "created_at": named.created_at.isoformat(),
        "policy": _with_names_for(json.loads(named.policy), tenant),
    }


def _with_names_for(policy: JsonObject, tenant: str) -> JsonObject:
    """Return the policy with the tenant's own adapters under their bare names."""
    for fields in (policy, policy.get("variant", {})):
        if "model" in fields:
            fields["model"] = fields["model"].removeprefix(f"{tenant}/")
        for choice in fields.get("lora", {}).get("adapters", ()):
            choice["name"] = choice["name"].removeprefix(f"{tenant}/")
    return policy
