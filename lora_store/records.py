"""The catalogue's record of one version of one adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from lora_store.trials import Trial

Visibility = Literal["public", "private"]
VISIBILITIES: tuple[str, ...] = get_args(Visibility)


@dataclass(frozen=True, slots=True)
class OutputProfile:
    """The common features of an adapter's sample outputs: a small label set, or else their mean vector. D dimensions.

    The vector is stored as bytes, since its direction is only compared with a threshold.
    """

    labels: tuple[str, ...] = ()  # distinct, sorted; empty for free text
    vector: NDArray[np.int8] | None = field(default=None, compare=False, repr=False)  # (D,); None for labels


@dataclass(frozen=True, slots=True)
class Embedding:
    """An adapter's vector in one encoder's space.

    Dims: D dimensions, S samples (0 for fewer than two), A accepted prompts, which are no part of the other arrays.
    Embeddings compare equal if the same encoder made them: encoder and samples determine the arrays.
    """

    encoder: str  # the encoder's identity
    vector: NDArray[np.float32] = field(compare=False, repr=False)  # (D,), length 1
    own_scores: NDArray[np.float32] = field(compare=False, repr=False)  # (S,) cosine of each sample to the others' mean
    outputs: OutputProfile | None = field(default=None, compare=False, repr=False)  # None for too few outputs
    accepted: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)  # (A, D); None for none


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version of one adapter. `embedding` is None if the adapter has no samples; then `auto` cannot find it."""

    ref: AdapterRef
    weights_digest: str
    samples_digest: str | None
    visibility: Visibility
    tags: tuple[str, ...]
    base_model: str
    ranks: tuple[int, ...]  # distinct, sorted
    target_modules: tuple[str, ...]  # distinct last parts of the module paths, sorted
    num_bytes: int
    num_samples: int
    template: str | None
    embedding: Embedding | None
    probe_shift: float | None
    source: str
    actor: str
    created_at: datetime  # UTC, of the first publish of this version
    generation: int
    approved: bool = False  # an admin approved this version (not the name)
    expires_at: datetime | None = None  # UTC, of an unlisted adapter: then it is withdrawn; None: listed and kept
    trial: Trial | None = None  # another version answers a share of this live one's requests
    is_offered: bool = False  # it was never live: it only took part in a trial
    live_since: datetime | None = None  # UTC, of a version that was made live again; None: since its first publish
    contract: str | None = None  # JSON, how it wants to be asked; applied where it leads a plan

    @property
    def encoder(self) -> str | None:
        """The identity of the encoder that made the embedding."""
        return None if self.embedding is None else self.embedding.encoder

    @property
    def blobs(self) -> tuple[str, ...]:
        """The digests of its stored blobs."""
        return (self.weights_digest,) if self.samples_digest is None else (self.weights_digest, self.samples_digest)

    @property
    def is_unlisted(self) -> bool:
        """Whether only its name finds it: no list shows it, and `auto` never chooses it."""
        return self.expires_at is not None

    def is_expired(self, now: datetime) -> bool:
        """Return whether its time to live is over at `now`, in UTC."""
        return self.expires_at is not None and self.expires_at <= now

    def is_visible_to(self, tenant: str) -> bool:
        """Return whether `tenant` may use it by name and see it in lists."""
        return self.visibility == "public" or self.ref.tenant == tenant

    def is_open(self, *, requires_approval: bool) -> bool:
        """Return whether `auto` may choose it for every tenant. Its own tenant's `auto` always may."""
        return self.visibility == "public" and (self.approved or not requires_approval)
