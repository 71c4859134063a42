"""Errors of the retriever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_store.error_kinds import RETRY_LATER, Kind, ReportedError


class RetrieverError(ReportedError):
    """Base class of the errors of `retriever_svc`."""


@dataclass(eq=False)
class EncoderUnusable(RetrieverError):
    """The encoder's model cannot be loaded, or is not the one that embedded the pool."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Name a folder with safetensors weights, or a model hub id."
    text = "encoder {self.model!r} cannot be used: {self.reason}"

    model: str
    reason: str


class ProjectionUnusable(RetrieverError):
    """The encoder's projection is missing next to the catalogue or damaged, or the pool has too few samples for one."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Reindex with the projection `auto` or `none`, or publish more samples."


class RouteInvalid(RetrieverError):
    """An option of the retrieval is out of its range."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Correct that option."


@dataclass(eq=False)
class AdapterIncompatible(RetrieverError):
    """The adapter was made for another base model than the served one."""

    kind = Kind.INVALID
    code = "adapter_incompatible"
    remedy = (
        "Name another adapter, or publish one that was trained on this base. If both names mean the same "
        "weights, add the adapter's to `accepts_base`."
    )

    name: str
    base_model: str
    served: str

    def __str__(self) -> str:
        base_model = self.base_model[:200]
        return (
            f"adapter {self.name[:200]!r} was made for the base model {base_model!r}, and this server serves"
            f" {self.served!r}: name another adapter, or start a server with base_model: {base_model}. If both names"
            f" mean the same weights, let the operator add {base_model!r} to the setting accepts_base"
        )


@dataclass(eq=False)
class PlanGone(RetrieverError):
    """A version in `lora.plan` is no longer kept, or is not visible to the caller."""

    kind = Kind.CONFLICT
    code = "plan_gone"
    remedy = "Request a new plan."
    param = "lora.plan"

    name: str
    digest: str

    def __str__(self) -> str:
        version = f"version {self.digest[:12]!r} of adapter {self.name[:200]!r}"
        return f"the plan cannot be replayed: {version} is no longer kept; request a new plan"


class TooFewSamples(RetrieverError):
    """Training needs more adapters, or more samples of the named ones."""


@dataclass(eq=False)
class TrainingUnavailable(RetrieverError):
    """Training needs packages that are not installed. The optional extra `train` installs them."""

    packages: Sequence[str]

    def __str__(self) -> str:
        return f"training needs {' and '.join(self.packages)}: pip install 'loraretriever[train]'"


@dataclass(eq=False)
class EncoderExists(RetrieverError):
    """The target folder of a training exists already."""

    text = "{self.folder} exists already: choose another folder, or delete it"

    folder: str


@dataclass(eq=False)
class NoAdapterMatched(RetrieverError):
    """No candidate reaches its threshold, and `fallback` is `error`.

    `best_score` is None if there was no candidate; `threshold` is the best one's.
    """

    kind = Kind.UNANSWERABLE
    code = "no_adapter_matched"
    remedy = (
        "Use `lora.fallback: base` or `lora.abstain: lenient`, or give the adapter more samples. If `min_score` is set,"
        " lower it."
    )

    best_score: float | None
    threshold: float

    def __str__(self) -> str:
        if self.best_score is None:
            return "no adapter matched: there are no candidates for this request"
        return f"no adapter matched: the best scores {self.best_score:.3f}, below its threshold {self.threshold:.3f}"


@dataclass(eq=False)
class StaleIndex(RetrieverError):
    """The Retriever has not read `lora.min_generation` yet."""

    kind = Kind.BUSY
    code = "stale_index"
    remedy = RETRY_LATER
    text = "generation {self.wanted} is not served yet: this replica is at {self.found}; retry later"

    wanted: int
    found: int
