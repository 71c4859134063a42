"""The options of a request about adapters, in this API's words and in those of other servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.base import ApiRequest, problem
from deployments.api.unsupported_fields import unsupported
from retriever_svc import PinnedAdapter

MAX_ADAPTERS = 16
Weight = Annotated[float, Field(ge=-4, le=4)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
AdapterName = Annotated[str, Field(min_length=1, max_length=256)]


class AdapterChoice(ApiRequest):
    """An adapter the client names itself: `name`, `owner/name`, or with `@digest` one exact version."""

    name: AdapterName
    weight: Weight = 1.0


class LoraFilter(ApiRequest):
    """Which adapters retrieval may choose: those that carry all of `tags`."""

    tags: Annotated[list[Tag], Field(fail_fast=True, min_length=1, max_length=32)]


class PlanRow(ApiRequest):
    """One adapter of a plan that is sent back, as an answer reported it."""

    name: AdapterName
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    weight: Weight
    score: float | None = Field(default=None, ge=-2, le=2)

    def pinned(self) -> PinnedAdapter:
        return PinnedAdapter(self.name, self.digest, self.weight, self.score)


class PlanGiven(ApiRequest):
    """A plan that is sent back, as `lora` of an answer or `/v1/route` gave it; `candidates` are not read again."""

    strategy: Literal["base", "selection", "mixture", "fusion"]
    adapters: list[PlanRow] = Field(fail_fast=True, default=[], max_length=MAX_ADAPTERS)
    generation: int = Field(default=0, ge=0, lt=2**63)
    abstained: bool = False
    candidates: list[Any] = Field(default=[], max_length=64)


class LoraOptions(ApiRequest):
    """The options of a request about adapters. Unset fields use the server's defaults."""

    strategy: Literal["selection", "mixture", "fusion"] | None = None
    k: int | None = Field(default=None, ge=1, le=MAX_ADAPTERS)
    adapters: Annotated[list[AdapterChoice], Field(fail_fast=True, min_length=1, max_length=MAX_ADAPTERS)] | None = None
    weights: Literal["uniform", "softmax"] | None = None
    min_score: float | None = Field(default=None, ge=-1, le=1)
    fallback: Literal["base", "error"] | None = None
    filter: LoraFilter | None = None
    query: str | None = Field(default=None, min_length=1, max_length=65_536)
    plan: PlanGiven | None = None
    min_generation: int = Field(default=0, ge=0, lt=2**63)
    explain: bool = False

    @property
    def of_retrieval(self) -> list[str]:
        """The fields that were set and mean nothing where adapters are named."""
        fields = ("k", "weights", "min_score", "fallback", "filter", "query")
        return [field for field in fields if getattr(self, field) is not None]

    @property
    def names_adapters(self) -> str | None:
        """The field that says which adapters answer, if any does."""
        return next((field for field in ("plan", "adapters") if getattr(self, field) is not None), None)


def _linear(value: Any) -> Any:
    if isinstance(value, str) and value != "linear":
        raise unsupported("", "merge strategies other than 'linear'")
    return value


class MergedAdapters(ApiRequest):
    """LoRAX's `merged_adapters`. `linear` is fusion, here with each adapter's own scaling."""

    ids: Annotated[list[AdapterName], Field(fail_fast=True, min_length=1, max_length=MAX_ADAPTERS)]
    weights: Annotated[list[Weight], Field(fail_fast=True, max_length=MAX_ADAPTERS)] | None = None
    merge_strategy: Annotated[Literal["linear"], BeforeValidator(_linear)] = "linear"
    density: Literal[0] = 0  # of the strategies that drop weights

    @model_validator(mode="after")
    def _as_many_weights(self) -> Self:
        if self.weights and len(self.weights) != len(self.ids):
            raise problem("weights", f"{len(self.weights)} do not go with {len(self.ids)} ids")
        return self

    def options(self, asked: LoraOptions) -> LoraOptions:
        """Return these options in this API's words, combined with the other options of the request."""
        weights = self.weights or [1.0] * len(self.ids)
        choices = [AdapterChoice(name=name, weight=weight) for name, weight in zip(self.ids, weights, strict=True)]
        return asked.model_copy(update={"adapters": choices, "strategy": "fusion"})


def options_of_path(path: str | None, asked: LoraOptions) -> LoraOptions:
    """SGLang's `lora_path` of one prompt in this API's words: that adapter alone, or the base model for null."""
    if path is None:
        return asked.model_copy(update={"plan": PlanGiven(strategy="base")})
    return asked.model_copy(update={"adapters": [AdapterChoice(name=path)], "strategy": "selection"})
