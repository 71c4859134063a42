"""Load and keep the encoder of each generation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, get_args

from lora_store.snapshot import ActiveEncoder
from retriever_svc.encoder import Encoder
from retriever_svc.encoder_files import EARLIER_MODELS
from retriever_svc.errors import EncoderUnusable
from retriever_svc.projection_files import ProjectionFiles
from retriever_svc.whitening import split_identity

logger = logging.getLogger(__name__)

LoadEncoder = Callable[[str], Encoder]
Projection = Literal["auto", "none"]  # auto: the packaged one, if there is one for the encoder
PROJECTIONS: tuple[str, ...] = get_args(Projection)


class EncoderRegistry:
    """Loads encoders by model, and keeps the active one and the one prepared last.

    `default_model` is active until a reindex activates another, with the projection that `projection` says. `files`:
    where projections are found; without it there are none.
    """

    def __init__(
        self,
        load: LoadEncoder,
        default_model: str,
        files: ProjectionFiles | None = None,
        projection: Projection = "auto",
    ) -> None:
        self._load, self._default_model = load, default_model
        self._files, self._projection = files, projection
        self._current: Encoder | None = None
        self._prepared: Encoder | None = None

    def load_encoder(self, active: ActiveEncoder | None, embedded_by: str | None = None) -> Encoder:
        """Return the encoder of a generation; load it if necessary. Use it from one thread.

        `embedded_by`: the identity of the encoder that embedded the pool. Its projection, or none, stays in service
        until a reindex, and so does an earlier default encoder.
        Raises: EncoderUnusable if it cannot be loaded, or if its model has changed since; ProjectionUnusable;
        StoreUnavailable.
        """
        if active is None:
            self._current = self._current or self._default(embedded_by)
        elif self._current is None or self._current.identity != active.identity:
            self._current = self._activated(active)
        return self._current

    def _default(self, embedded_by: str | None) -> Encoder:
        encoder = self._load(self._default_model)
        if embedded_by is not None and split_identity(embedded_by)[0] != encoder.identity:
            encoder = self._earlier_default(embedded_by) or encoder
        if embedded_by == encoder.identity:
            return encoder
        if embedded_by is not None and self._files is not None:
            earlier = self._files.embedded_with(embedded_by, encoder.identity)
            if earlier is not None:
                return encoder.projected(earlier)
        return self._with_default(encoder, self._projection)

    def _earlier_default(self, embedded_by: str) -> Encoder | None:
        """Return the earlier default encoder that embedded the pool, if any. It stays in service until a reindex."""
        for model in EARLIER_MODELS:
            try:
                earlier = self._load(model)
            except EncoderUnusable:
                continue
            if earlier.identity == split_identity(embedded_by)[0]:
                logger.warning(
                    "the pool was embedded by %s, the default of an earlier version, and stays so until"
                    " `loraretriever pool reindex --encoder %s`",
                    model,
                    self._default_model,
                )
                return earlier
        return None

    def _with_default(self, encoder: Encoder, projection: str) -> Encoder:
        if projection == "none" or self._files is None:
            return encoder
        shipped = self._files.shipped(encoder.identity)
        if shipped is None:
            return encoder
        self._files.keep(shipped)
        return encoder.projected(shipped)

    def _activated(self, active: ActiveEncoder) -> Encoder:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.identity == active.identity:
            return prepared
        loaded = self._with_identity(self._find_activated(active), active.identity)
        if loaded.identity != active.identity:
            reason = f"it has identity {loaded.identity}, but the pool's embeddings have {active.identity}: reindex"
            raise EncoderUnusable(active.model, reason)
        return loaded

    def _find_activated(self, active: ActiveEncoder) -> Encoder:
        """Return the plain encoder; the default one if that is the same and only its folder is another here."""
        try:
            return self._load(active.model)
        except EncoderUnusable:
            with suppress(EncoderUnusable):
                default = self._load(self._default_model)
                if default.identity == split_identity(active.identity)[0]:
                    return default
            raise

    def _with_identity(self, encoder: Encoder, identity: str) -> Encoder:
        """Return the encoder with the projection of `identity`, if this is an identity of the encoder."""
        plain, digest = split_identity(identity)
        if self._files is None or not digest or plain != encoder.identity:
            return encoder
        return encoder.projected(self._files.find(identity))

    def prepare(self, model: str, projection: str = "auto") -> Encoder:
        """Load the encoder of `model` and keep it for the generation that activates it.

        `projection`: auto, none, or the identity of an encoder with the wanted one. The encoder of this identity that
        is prepared or active already is not loaded again.
        Raises: EncoderUnusable, ProjectionUnusable.
        """
        for kept in (self._prepared, self._current):
            if kept is not None and kept.identity == projection:
                self._prepared = kept
                return kept
        encoder = self._load(model)
        if projection in PROJECTIONS:
            self._prepared = self._with_default(encoder, projection)
        else:
            self._prepared = self._with_identity(encoder, projection)
        return self._prepared
