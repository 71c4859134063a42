"""Errors of the retriever.

RetrieverError
├── EncoderUnusable     the encoder model cannot be loaded, or is not the one the pool was embedded by
├── NothingToEmbed      an adapter without samples has no embedding; it is reachable by name only
├── RouteInvalid        a route request breaks a rule
├── PlanGone            a plan to be replayed holds a version that is not kept any more
├── TooFewSamples       an encoder cannot be trained on these
├── TrainingUnavailable the packages that train an encoder are not installed
├── EncoderExists       something is where the trained encoder should go
├── NoAdapterMatched    the best adapter scores below the floor and the caller wanted no base model
└── StaleIndex          this replica has not seen the wanted generation yet; retry later
"""

from __future__ import annotations

from collections.abc import Sequence


class RetrieverError(Exception):
    """Base class of everything `retriever_svc` raises on purpose."""


class EncoderUnusable(RetrieverError):
    """No encoder could be made of this model. Give a folder with safetensors weights, or a model hub id."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model = model
        self.reason = reason

    def __str__(self) -> str:
        return f"encoder {self.model!r} cannot be used: {self.reason}"


class NothingToEmbed(RetrieverError):
    """The adapter has no samples. Publish it without an embedding."""


class RouteInvalid(RetrieverError):
    """Mend the request."""


class PlanGone(RetrieverError):
    """This plan cannot be replayed: one of its versions is gone, or never was this caller's to see. Plan anew."""

    param = "lora.plan"

    def __init__(self, name: str, digest: str) -> None:
        super().__init__(name, digest)
        self.name = name
        self.digest = digest

    def __str__(self) -> str:
        return f"the plan cannot be replayed: version {self.digest[:12]!r} of adapter {self.name[:200]!r} is not kept"


class TooFewSamples(RetrieverError):
    """Give more adapters, or more samples of those named."""


class TrainingUnavailable(RetrieverError):
    """Install the optional extra `train`."""

    def __init__(self, packages: Sequence[str]) -> None:
        super().__init__(packages)
        self.packages = packages

    def __str__(self) -> str:
        return f"training needs {' and '.join(self.packages)}: pip install 'loraretriever[train]'"


class EncoderExists(RetrieverError):
    """Choose another folder, or remove what is there."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = folder

    def __str__(self) -> str:
        return f"{self.folder} is there already, and an encoder is never overwritten"


class NoAdapterMatched(RetrieverError):
    """No adapter fits this prompt well enough. `best_score` is None where there is none to choose from."""

    def __init__(self, best_score: float | None, floor: float) -> None:
        super().__init__(best_score, floor)
        self.best_score = best_score
        self.floor = floor

    def __str__(self) -> str:
        if self.best_score is None:
            return "no adapter matched: there is none to choose from"
        return f"no adapter matched: the best scores {self.best_score:.3f}, wanted at least {self.floor:.3f}"


class StaleIndex(RetrieverError):
    """The catalogue this replica reads does not have the wanted generation yet. Retry later."""

    def __init__(self, wanted: int, found: int) -> None:
        super().__init__(wanted, found)
        self.wanted = wanted
        self.found = found

    def __str__(self) -> str:
        return f"generation {self.wanted} wanted, this replica is at {self.found}"
