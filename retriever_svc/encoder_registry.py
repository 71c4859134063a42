"""Which encoder a generation is searched by, loaded before it is needed where that is known."""

from __future__ import annotations

from collections.abc import Callable

from lora_store.snapshot import ActiveEncoder
from retriever_svc.encoder import Encoder
from retriever_svc.errors import EncoderUnusable

LoadEncoder = Callable[[str], Encoder]


class Encoders:
    """Loads encoders by their model, and holds the one in force and the one prepared last."""

    def __init__(self, load: LoadEncoder, default_model: str) -> None:
        """`default_model` is in force until a reindex activated another."""
        self._load, self._default_model = load, default_model
        self._current: Encoder | None = None
        self._prepared: Encoder | None = None

    def in_force(self, active: ActiveEncoder | None) -> Encoder:
        """The encoder of a generation, loaded where it is not yet. For one thread.

        Raises: EncoderUnusable: it cannot be loaded, or its model is another one by now.
        """
        if active is None:
            self._current = self._current or self._load(self._default_model)
        elif self._current is None or self._current.identity != active.identity:
            self._current = self._chosen(active)
        return self._current

    def _chosen(self, active: ActiveEncoder) -> Encoder:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.identity == active.identity:
            return prepared
        loaded = self._load(active.model)
        if loaded.identity != active.identity:
            reason = f"the pool is embedded by identity {active.identity}, and this is {loaded.identity}"
            raise EncoderUnusable(active.model, reason)
        return loaded

    def prepare(self, model: str) -> Encoder:
        """The encoder of `model` as it is now, held ready for the generation that activates it.

        Raises: EncoderUnusable.
        """
        self._prepared = self._load(model)
        return self._prepared
