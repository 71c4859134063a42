"""Encode many texts in small chunks, so that a prompt waits for one chunk at most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retriever_svc.encoder import Encoder, Vectors, project, split_chunks
from retriever_svc.vector_cache import OwnedText


class BulkEncoding:
    """Encodes texts chunk by chunk. The encoder serves other callers between two chunks.

    `owners` has one entry per text, as in `Encoder.encode`. Each text of an owner is encoded once.
    `chunks`: the arguments for `encode`, shortest texts first.
    """

    def __init__(self, encoder: Encoder, texts: Sequence[str], owners: Sequence[str] | None = None) -> None:
        self._encoder, self._has_owners = encoder, owners is not None
        self._keys = list(zip([""] * len(texts) if owners is None else owners, texts, strict=True))
        self.chunks = list(split_chunks(dict.fromkeys(self._keys)))
        self._rows: dict[OwnedText, Vectors] = {}

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self._encoder

    def encode(self, chunk: Sequence[OwnedText]) -> None:
        """Encode one of `chunks` and store its vectors."""
        owners = [owner for owner, _ in chunk] if self._has_owners else None
        self._rows.update(zip(chunk, self._encoder.encode_plain([text for _, text in chunk], owners), strict=True))

    def vectors(self) -> Vectors:
        """Return the projected row of each text, in order: (N, D) float32. Every chunk must have been encoded."""
        return project(self._encoder, self.plain_vectors())

    def plain_vectors(self) -> Vectors:
        """Return the row of each text before the projection, as `vectors` does."""
        rows = [self._rows[key] for key in self._keys]
        return np.stack(rows) if rows else np.empty((0, self._encoder.dim), np.float32)

    def encode_all(self) -> Vectors:
        """Encode every chunk and return the row of each text, in order: (N, D) float32."""
        for chunk in self.chunks:
            self.encode(chunk)
        return self.vectors()
