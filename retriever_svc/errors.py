"""Errors of the retriever.

RetrieverError
├── EncoderUnusable     the encoder cannot be loaded, or is not the one that made the pool's embeddings
├── ProjectionUnusable  a projection cannot be read, or there are too few samples to fit one
├── NothingToEmbed      the adapter has no samples, so it has no embedding and is reachable by name only
├── RouteInvalid        a route request breaks a rule
├── AdapterIncompatible an adapter that a request names was made for another base model
├── PlanGone            a plan to be replayed contains a version that is no longer kept
├── TooFewSamples       there are too few samples to train an encoder
├── TrainingUnavailable the packages that train an encoder are not installed
├── EncoderExists       the target folder of a training exists already
├── NoAdapterMatched    no candidate reaches its threshold and the caller wanted no base model
└── StaleIndex          this replica has not reached the wanted generation yet; retry later
"""

from __future__ import annotations

from collections.abc import Sequence


class RetrieverError(Exception):
    """Base class of the errors of `retriever_svc`."""


class EncoderUnusable(RetrieverError):
    """The model cannot be used as encoder. Give a folder with safetensors weights, or a model hub id."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model = model
        self.reason = reason

    def __str__(self) -> str:
        return f"encoder {self.model!r} cannot be used: {self.reason}"


class ProjectionUnusable(RetrieverError):
    """A projection cannot be read or fitted. Reindex with another `projection`."""


class NothingToEmbed(RetrieverError):
    """The adapter has no samples. Publish it without an embedding."""


class RouteInvalid(RetrieverError):
    """The request has a value out of range. Correct the request."""


class AdapterIncompatible(RetrieverError):
    """The adapter was made for another base model than the served one. Name another adapter."""

    def __init__(self, name: str, base_model: str, served: str) -> None:
        super().__init__(name, base_model, served)
        self.name = name
        self.base_model = base_model
        self.served = served

    def __str__(self) -> str:
        base_model = self.base_model[:200]
        return (
            f"adapter {self.name[:200]!r} was made for the base model {base_model!r}, and this server serves"
            f" {self.served!r}: name another adapter, or start a server with base_model: {base_model}. If both names"
            f" mean the same weights, let the operator add {base_model!r} to the setting accepts_base"
        )


class PlanGone(RetrieverError):
    """The plan cannot be replayed: a version of it is not kept, or not visible to the caller. Request a new plan."""

    param = "lora.plan"

    def __init__(self, name: str, digest: str) -> None:
        super().__init__(name, digest)
        self.name = name
        self.digest = digest

    def __str__(self) -> str:
        version = f"version {self.digest[:12]!r} of adapter {self.name[:200]!r}"
        return f"the plan cannot be replayed: {version} is no longer kept; request a new plan"


class TooFewSamples(RetrieverError):
    """Training needs more adapters, or more samples of the named ones."""


class TrainingUnavailable(RetrieverError):
    """Training needs packages that are not installed. Install the optional extra `train`."""

    def __init__(self, packages: Sequence[str]) -> None:
        super().__init__(packages)
        self.packages = packages

    def __str__(self) -> str:
        return f"training needs {' and '.join(self.packages)}: pip install 'loraretriever[train]'"


class EncoderExists(RetrieverError):
    """The target of a training exists. Choose another folder, or delete it."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = folder

    def __str__(self) -> str:
        return f"{self.folder} exists already: choose another folder, or delete it"


class NoAdapterMatched(RetrieverError):
    """No adapter fits this prompt. `best_score` is None if there was no candidate; `threshold` is the best one's."""

    def __init__(self, best_score: float | None, threshold: float) -> None:
        super().__init__(best_score, threshold)
        self.best_score = best_score
        self.threshold = threshold

    def __str__(self) -> str:
        if self.best_score is None:
            return "no adapter matched: there are no candidates for this request"
        return f"no adapter matched: the best scores {self.best_score:.3f}, below its threshold {self.threshold:.3f}"


class StaleIndex(RetrieverError):
    """This replica does not serve the wanted generation yet. Retry later."""

    def __init__(self, wanted: int, found: int) -> None:
        super().__init__(wanted, found)
        self.wanted = wanted
        self.found = found

    def __str__(self) -> str:
        return f"generation {self.wanted} is not served yet: this replica is at {self.found}; retry later"
