"""Build the retrieval parts from the application's settings, for the server and for offline runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from deployments.api.pool_responses import unserved_text
from deployments.config.app import AppConfig
from lora_store import Snapshot
from lora_store.files import Files
from lora_store.garbage_collection import PROJECTIONS
from lora_store.location import Location
from retriever_svc import Encoder, IndexSettings, LivePool, ProjectionFiles, Retriever, SavedIndexes
from retriever_svc.retriever import Timings

logger = logging.getLogger(__name__)


def live_pool(config: AppConfig, snapshots: Callable[[], Snapshot], index: IndexSettings | None = None) -> LivePool:
    """Return the pool of the snapshots, embedded by the active encoder, without adapters of other base models.

    Raises: EncoderUnusable, ProjectionUnusable, StoreUnavailable.
    """
    settings = config.retrieval
    pools = LivePool(
        lambda model: Encoder(
            model,
            num_threads=settings.encoder_threads,
            dtype=settings.encoder_dtype,
            exact_by="openvino",
            cache_dir=config.cache_dir,
        ),
        snapshots,
        model=settings.encoder,
        settings=replace(index or IndexSettings(), requires_approval=config.public_requires_approval),
        saved=SavedIndexes(Files(Location(config.store_uri).child("index"))),
        projections=ProjectionFiles(Files(Location(config.store_uri).child(PROJECTIONS))),
        projection=settings.projection,
        bases=config.served_models.bases,
    )
    for base_model, num_adapters in pools.current.unserved():
        logger.warning(unserved_text(base_model, num_adapters))
    return pools


def retriever_over(pools: LivePool, config: AppConfig, timings: Timings | None = None) -> Retriever:
    """Return the Retriever of the pool."""
    settings = config.retrieval
    return Retriever(
        pools,
        min_score=settings.min_score,
        abstain=settings.abstain,
        top_k=settings.k,
        owner_names=config.owner_names,
        applies_outcomes=config.learning == "apply",
        timings=timings,
    )
