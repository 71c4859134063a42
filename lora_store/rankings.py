"""Measured scores of adapters on the examples of one adapter, in the form that the catalogue keeps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef

OUTCOME = "outcome:"  # no adapter's name has a colon


@dataclass(frozen=True, slots=True)
class RankedAdapter:
    """One adapter's mean score on `num_examples` examples: from 0 to 1, of an outcome from -1 to 1.

    `is_beaten`: another adapter of the ranking is clearly better, and this one may be judged on these examples.
    """

    ref: AdapterRef
    score: float
    num_examples: int
    is_beaten: bool


@dataclass(frozen=True, slots=True)
class Ranking:
    """The adapters that were measured on the examples of `anchor`, best first. Dims: D dimensions, S examples.

    A ranking names exact versions: an update of an adapter takes it out of the ranking. `vector` is that of the anchor,
    so that its region is still found after the anchor was withdrawn.
    Of an outcome `vector` is that of the prompt. It names the adapter that a client judged there, or none if the base
    model should answer.
    """

    anchor: AdapterRef
    adapters: tuple[RankedAdapter, ...]
    encoder: str
    vector: NDArray[np.float32] = field(compare=False, repr=False)  # (D,), length 1
    own_scores: NDArray[np.float32] = field(compare=False, repr=False)  # (S,) as in Embedding

    @property
    def is_outcome(self) -> bool:
        """Whether a client's outcome of one request made it, and no evaluation."""
        return self.anchor.name.startswith(OUTCOME)

    def to_json(self) -> str:
        """Return everything but the arrays."""
        return json.dumps({"anchor": asdict(self.anchor), "adapters": [asdict(item) for item in self.adapters]})

    @classmethod
    def from_json(
        cls, text: str, encoder: str, vector: NDArray[np.float32], own_scores: NDArray[np.float32]
    ) -> Ranking:
        """Return the ranking that `to_json` wrote, with its arrays."""
        raw = json.loads(text)
        adapters = tuple(RankedAdapter(**item | {"ref": AdapterRef(**item["ref"])}) for item in raw["adapters"])
        return cls(AdapterRef(**raw["anchor"]), adapters, encoder, vector, own_scores)
