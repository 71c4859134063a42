"""Load and keep the encoder of each generation."""

from __future__ import annotations

from collections.abc import Callable

from lora_store.snapshot import ActiveEncoder
from retriever_svc.encoder import Encoder
from retriever_svc.errors import EncoderUnusable

LoadEncoder = Callable[[str], Encoder]


class EncoderRegistry:
    """Loads encoders by model, and keeps the active one and the one prepared last.

    `default_model` is active until a reindex activates another.
    """

    def __init__(self, load: LoadEncoder, default_model: str) -> None:
        self._load, self._default_model = load, default_model
        self._current: Encoder | None = None
        self._prepared: Encoder | None = None

    def encoder_of(self, active: ActiveEncoder | None) -> Encoder:
        """Return the encoder of a generation; load it if necessary. Use it from one thread.

        Raises: EncoderUnusable if it cannot be loaded, or if its model has changed since.
        """
        if active is None:
            self._current = self._current or self._load(self._default_model)
        elif self._current is None or self._current.identity != active.identity:
            self._current = self._activated(active)
        return self._current

    def _activated(self, active: ActiveEncoder) -> Encoder:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.identity == active.identity:
            return prepared
        loaded = self._load(active.model)
        if loaded.identity != active.identity:
            reason = f"it has identity {loaded.identity}, but the pool's embeddings have {active.identity}: reindex"
            raise EncoderUnusable(active.model, reason)
        return loaded

    def prepare(self, model: str) -> Encoder:
        """Load the encoder of `model` and keep it for the generation that activates it. Raises: EncoderUnusable."""
        self._prepared = self._load(model)
        return self._prepared
