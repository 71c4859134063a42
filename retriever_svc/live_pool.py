"""The pool that is served: its current generation and encoder, and index maintenance in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lora_store.errors import StoreUnavailable
from lora_store.snapshot import Snapshot
from retriever_svc.encoder import Encoder
from retriever_svc.encoder_files import DEFAULT_MODEL
from retriever_svc.encoder_registry import EncoderRegistry, LoadEncoder, Projection
from retriever_svc.errors import ProjectionUnusable, StaleIndex
from retriever_svc.index import AdapterIndex, IndexSettings
from retriever_svc.inverted_lists import InvertedLists
from retriever_svc.pool import Pool, routable
from retriever_svc.projection_files import ProjectionFiles
from retriever_svc.reindex import refit
from retriever_svc.sample_source import SampleSource
from retriever_svc.saved_index import SavedIndexes, SavedLists
from retriever_svc.served_bases import ServedBases
from retriever_svc.whitening import Whitening

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Numbers about one replica's index."""

    generation: int
    encoder: str
    num_live: int
    num_positions: int  # including dead ones
    num_unlisted: int  # searched exactly: all rows, or those newer than the lists
    has_lists: bool
    num_bytes: int


def in_thread(work: Callable[[], None]) -> None:
    """Run `work` on a new daemon thread."""
    threading.Thread(target=work, name="index-rebuild", daemon=True).start()


class LivePool:
    """Serves one Pool at a time and replaces it as a whole. No read waits for a refresh or mixes two generations.

    The cost of a new generation depends on its changes. `background` runs the training of lists and the removal of dead
    positions. With `saved`, trained lists are stored and loaded again at start. With `projections`, the encoder has a
    projection (see `whitening`) and candidates are compared with ordinary prompts.
    """

    def __init__(
        self,
        load_encoder: LoadEncoder,
        snapshots: Callable[[], Snapshot],
        *,
        model: str = DEFAULT_MODEL,
        settings: IndexSettings | None = None,
        saved: SavedIndexes | None = None,
        projections: ProjectionFiles | None = None,
        projection: Projection = "auto",
        bases: ServedBases | None = None,
        background: Callable[[Callable[[], None]], None] = in_thread,
    ) -> None:
        """Build the first pool. `model` and `projection` are used until the catalogue names others.

        `bases`: only the adapters of these base models are served; by default all are.
        Raises: EncoderUnusable, ProjectionUnusable, StoreUnavailable.
        """
        self._encoders = EncoderRegistry(load_encoder, model, projections, projection)
        self._projections = projections
        self._snapshots, self._settings = snapshots, settings or IndexSettings()
        self._saved, self._background, self._bases = saved, background, bases or ServedBases()
        self._lock = threading.Lock()
        self._is_rebuilding = False
        snapshot = snapshots()
        encoder = self._encoders.load_encoder(snapshot.encoder, snapshot.embedded_by())
        self._pool = self._built(snapshot, encoder)
        if num := sum(record.encoder not in (None, encoder.identity) for record in snapshot.records.values()):
            active = model if snapshot.encoder is None else snapshot.encoder.model
            logger.warning(
                "auto does not find %d of %d adapters, embedded by another encoder or projection:"
                " run `loraretriever pool reindex --encoder %s`",
                num,
                len(snapshot.records),
                active,
            )
        self._rebuild_where_wanted()

    @property
    def projections(self) -> ProjectionFiles | None:
        """The projections of the store, if the encoder may have one."""
        return self._projections

    @property
    def current(self) -> Pool:
        """The pool that is being served."""
        return self._pool

    def catch_up(self, generation: int = 0) -> int:
        """Serve the catalogue's newest generation, at least `generation`, and return it. Reads continue meanwhile.

        Raises: StaleIndex if the catalogue is older; its newest generation is served then, and the caller may retry.
        EncoderUnusable if the newest generation's encoder cannot be loaded; the previous generation stays in service.
        """
        with self._lock:
            snapshot = self._snapshots()
            if snapshot.generation > self._pool.snapshot.generation:
                self._pool = self._next(snapshot)
            served = self._pool.snapshot.generation
        self._rebuild_where_wanted()
        if served < generation:
            raise StaleIndex(generation, served)
        return served

    def prepare_encoder(self, model: str, projection: str = "auto") -> Encoder:
        """Load the encoder of `model` for the generation that activates it; `projection` as in `EncoderRegistry`.

        Raises: EncoderUnusable, ProjectionUnusable.
        """
        encoder = self._encoders.prepare(model, projection)
        if self._projections is not None:
            self._projections.ordinary(encoder)  # now, rather than while the generation changes
        return encoder

    def refit(self, model: str, samples: SampleSource) -> Whitening:
        """Fit a projection for the encoder of `model` to the pool's samples, and save it.

        Raises: EncoderUnusable, ProjectionUnusable, StoreUnavailable.
        """
        if self._projections is None:
            raise ProjectionUnusable("this pool has no place for projections")
        encoder = self._encoders.prepare(model, "none")
        fitted = refit(self._pool.snapshot, encoder, samples, self._projections.shipped(encoder.identity))
        self._projections.save(fitted)
        return fitted

    def stats(self) -> IndexStats:
        """Return numbers about the index."""
        pool = self._pool
        index = pool.index
        return IndexStats(
            generation=pool.snapshot.generation,
            encoder=pool.encoder.identity,
            num_live=index.num_live,
            num_positions=index.num_positions,
            num_unlisted=index.num_unlisted,
            has_lists=index.lists is not None,
            num_bytes=index.num_bytes,
        )

    def _next(self, snapshot: Snapshot) -> Pool:
        encoder = self._encoders.load_encoder(snapshot.encoder)
        if encoder is not self._pool.encoder:
            logger.info("switching to encoder %s at generation %d", encoder.identity, snapshot.generation)
            return self._built(snapshot, encoder)
        try:
            pool = self._pool.after(snapshot)
        except Exception:  # the table shared with the previous pool may be half changed
            logger.exception("cannot update the index to generation %d; building a new one", snapshot.generation)
            return self._built(snapshot, encoder)
        if pool.index.wants_rebuild and not pool.index.wants_lists:  # small enough to do at once
            return pool.rebuilt(pool.index.compacted(), pool)
        return pool

    def _built(self, snapshot: Snapshot, encoder: Encoder) -> Pool:
        ordinary = centre = None
        if self._projections is not None:
            centre = self._projections.centre(encoder)
            ordinary = self._projections.ordinary(encoder)
        lists = self._saved_lists(snapshot, encoder)
        return Pool.of(snapshot, encoder, self._settings, lists, ordinary, self._bases, centre)

    def _saved_lists(self, snapshot: Snapshot, encoder: Encoder) -> InvertedLists | None:
        """Return lists that another replica trained, mapped to the positions of a pool built now."""
        records = routable(snapshot, encoder.identity, self._bases)
        if self._saved is None or len(records) <= self._settings.exact_rows:
            return None
        position_of = {record.ref: position for position, record in enumerate(records)}
        try:
            saved = self._saved.newest(encoder.identity)
            if saved is None:
                return None
            lists = saved.restored([position_of.get(ref, -1) for ref in saved.refs])
        except Exception:  # not reachable, or written by an incompatible version of FAISS or Arrow
            logger.warning("cannot use the saved index; training a new one", exc_info=True)
            return None
        logger.info("loaded the index of %d adapters, saved at generation %d", len(saved.refs), saved.generation)
        return lists

    def _rebuild_where_wanted(self) -> None:
        with self._lock:
            if self._is_rebuilding or not self._pool.index.wants_rebuild:
                return
            self._is_rebuilding = True
        self._background(self._rebuild)

    def _rebuild(self) -> None:
        """Build an index without dead positions, with lists if it is large; apply newer changes and switch to it."""
        try:
            pool = self._pool
            index = pool.index.compacted()
            index = index.trained() if index.wants_lists else index
            with self._lock:
                newest = self._pool
                if newest.encoder is pool.encoder:
                    self._pool = pool.rebuilt(index, newest)
            self._save(pool, index)
        finally:
            self._is_rebuilding = False
        self._rebuild_where_wanted()

    def _save(self, pool: Pool, index: AdapterIndex) -> None:
        if self._saved is None or index.lists is None:
            return
        refs = tuple(record.ref for record in index.records)
        data = index.lists.to_bytes()
        try:
            self._saved.save(SavedLists(pool.snapshot.generation, pool.encoder.identity, refs, data))
        except StoreUnavailable:
            logger.warning("cannot save the trained index; the next replica will train its own", exc_info=True)
