"""Shared parts of the request models: bounds, unsupported OpenAI fields, and the options of `lora`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.field_problems import did_you_mean
from retriever_svc import PinnedAdapter, Weighting

MAX_TEXT_CHARS = 4 << 20  # characters of any text, prompts included; no body is larger
MAX_LABEL_CHARS = 1024  # characters of labels that a client sends for its own use
_MAX_SHOWN_CHARS = 200  # of an unknown field's name
UNSUPPORTED = "unsupported"  # the type of the pydantic error, and the code of the response
ROLES = ("tool", "function")
PARTS = ("image_url", "image", "input_audio", "audio", "file", "video_url", "refusal")
MAX_ADAPTERS = 16
Weight = Annotated[float, Field(ge=-4, le=4)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]
AdapterName = Annotated[str, Field(min_length=1, max_length=256)]


class ApiRequest(BaseModel):
    """Refuse unknown keys. A null key counts as unset, because clients send all fields of their objects.

    Every list, mapping and text of a request is bounded, and lists are read up to the first bad item (`fail_fast`),
    since each bad item would become an error object of a kilobyte on the event loop. A test checks all fields.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _within_bounds(cls, data: object) -> object:
        """Drop the keys that are null, and refuse the first unknown one by name."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        known = cls.keys()
        for key in given:
            if key not in known:
                raise _unknown(str(key), known)
        return given

    @classmethod
    def keys(cls) -> set[str]:
        """Return the names of the fields in JSON."""
        return {field.alias or name for name, field in cls.model_fields.items()}


def _unknown(name: str, known: Iterable[str]) -> PydanticCustomError:
    shown = name[:_MAX_SHOWN_CHARS]
    context = {"param": shown, "hint": did_you_mean(shown, known)}
    return PydanticCustomError("unknown_field", "unknown field{hint}", context)


def at_most(max_items: int) -> Callable[[object], object]:
    """Return a before-validator that refuses larger lists and mappings before their items are read."""

    def bounded(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > max_items:
            raise PydanticCustomError(
                "too_many",
                "holds {given} items, at most {allowed} are allowed",
                {"given": len(value), "allowed": max_items},
            )
        return value

    return bounded


def problem(param: str, message: str) -> PydanticCustomError:
    """Return the error for a validator of a whole model. `param`: the wrong field."""
    return PydanticCustomError("invalid", "{reason}", {"param": param, "reason": message})


def unsupported(name: str, what: str = "it") -> PydanticCustomError:
    """Return the error for an unsupported field. `name`: the field below the current path, or "" for that path."""
    return PydanticCustomError(UNSUPPORTED, "this server does not support {what}", {"param": name, "what": what})


class AdapterChoice(ApiRequest):
    """An adapter that the client names: `name` or `owner/name`, with `@digest` for one exact version."""

    name: AdapterName
    weight: Weight = 1.0


class LoraFilter(ApiRequest):
    """The adapters that retrieval may choose: those that have all of `tags`."""

    tags: Annotated[list[Tag], Field(fail_fast=True, min_length=1, max_length=32)]


class PlanRow(ApiRequest):
    """One adapter of a plan that is sent back, as reported by an answer."""

    name: AdapterName
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    weight: Weight
    score: float | None = Field(default=None, ge=-2, le=2)

    def pinned(self) -> PinnedAdapter:
        return PinnedAdapter(self.name, self.digest, self.weight, self.score)


class PlanGiven(ApiRequest):
    """A plan that is sent back: `lora` of an answer or of `/v1/route`. Its `candidates` are not read."""

    strategy: Literal["base", "selection", "mixture", "fusion"]
    adapters: list[PlanRow] = Field(fail_fast=True, default=[], max_length=MAX_ADAPTERS)
    generation: int = Field(default=0, ge=0, lt=2**63)
    abstained: bool = False
    candidates: list[Any] = Field(default=[], max_length=64)
    reason: str | None = Field(default=None, max_length=64)
    why: str | None = Field(default=None, max_length=MAX_LABEL_CHARS)


class LoraOptions(ApiRequest):
    """The options of a request about adapters. Unset fields use the server's defaults."""

    strategy: Literal["selection", "mixture", "fusion"] | None = None
    k: int | None = Field(default=None, ge=1, le=MAX_ADAPTERS)
    adapters: Annotated[list[AdapterChoice], Field(fail_fast=True, min_length=1, max_length=MAX_ADAPTERS)] | None = None
    weights: Weighting | None = None
    min_score: float | None = Field(default=None, ge=-1, le=1)
    fallback: Literal["base", "error"] | None = None
    filter: LoraFilter | None = None
    query: str | None = Field(default=None, min_length=1, max_length=65_536)
    plan: PlanGiven | None = None
    min_generation: int = Field(default=0, ge=0, lt=2**63)
    explain: bool = False

    @property
    def of_retrieval(self) -> list[str]:
        """The set fields that have no effect if adapters are named."""
        fields = ("k", "weights", "min_score", "fallback", "filter", "query")
        return [field for field in fields if getattr(self, field) is not None]

    @property
    def names_adapters(self) -> str | None:
        """The field that names the adapters, or None."""
        return next((field for field in ("plan", "adapters") if getattr(self, field) is not None), None)


def _linear(value: object) -> object:
    if isinstance(value, str) and value != "linear":
        raise unsupported("", "merge strategies other than 'linear'")
    return value


class MergedAdapters(ApiRequest):
    """LoRAX's `merged_adapters`. `linear` is fusion, with each adapter's own scaling here."""

    ids: Annotated[list[AdapterName], Field(fail_fast=True, min_length=1, max_length=MAX_ADAPTERS)]
    weights: Annotated[list[Weight], Field(fail_fast=True, max_length=MAX_ADAPTERS)] | None = None
    merge_strategy: Annotated[Literal["linear"], BeforeValidator(_linear)] = "linear"
    density: Literal[0] = 0  # for LoRAX's strategies that drop weights

    @model_validator(mode="after")
    def _as_many_weights(self) -> Self:
        if self.weights and len(self.weights) != len(self.ids):
            raise problem("weights", f"{len(self.weights)} do not go with {len(self.ids)} ids")
        return self

    def options(self, asked: LoraOptions) -> LoraOptions:
        """Return these options in the terms of this API, combined with the other options of the request."""
        weights = self.weights or [1.0] * len(self.ids)
        choices = [AdapterChoice(name=name, weight=weight) for name, weight in zip(self.ids, weights, strict=True)]
        return asked.model_copy(update={"adapters": choices, "strategy": "fusion"})


def options_of_path(path: str | None, asked: LoraOptions) -> LoraOptions:
    """Return SGLang's `lora_path` of one prompt as options: that adapter alone, or the base model for null."""
    if path is None:
        return asked.model_copy(update={"plan": PlanGiven(strategy="base")})
    return asked.model_copy(update={"adapters": [AdapterChoice(name=path)], "strategy": "selection"})
