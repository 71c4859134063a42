"""The store: stage checks a folder and writes its blobs, commit makes many versions visible in one step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from lora_store.adapter import LOCAL_TENANT, AdapterRef, Sample
from lora_store.blobs import BlobStore
from lora_store.bounded_files import Limits
from lora_store.catalogue import Catalogue
from lora_store.conditional_writes import check_conditional_writes
from lora_store.errors import AdapterNotFound, StoreUnavailable
from lora_store.events import Event
from lora_store.garbage_collection import BlobCheck, Collected, GarbageCollector
from lora_store.leases import Leases
from lora_store.location import Location
from lora_store.quota import TenantQuota
from lora_store.records import AdapterRecord, Embedding, Visibility
from lora_store.rules import (
    Precondition,
    activate_events,
    approve_events,
    embed_events,
    publish_events,
    visibility_events,
    withdraw_events,
)
from lora_store.sample_files import parse_samples, write_samples
from lora_store.snapshot import ActiveEncoder, Snapshot
from lora_store.staging import Staged, staged_record
from lora_store.validation import Label, Shapes, check_folder
from lora_store.weights_blob import WeightsBlob, digest_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The generation from which the names are gone, and every version that this call withdrew."""

    generation: int
    records: tuple[AdapterRecord, ...]


class LoraStore:
    """Adapters under one URI: blobs by digest, and the catalogue of what is live. Versions never change.

    Every method may raise StoreUnavailable: nothing is lost, retry later.
    """

    def __init__(
        self,
        uri: str,
        *,
        accepts_base: Collection[str],
        limits: Limits | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._accepts_base, self._limits = frozenset(accepts_base), limits
        self._now = now
        self._location = location = Location(uri)
        self._blobs = BlobStore(location.child("blobs"))
        self._holds = Leases(location, now, sleep)
        self._catalogue = Catalogue(location.child("catalogue"), sleep)
        self._upkeep = GarbageCollector(self._blobs, self._holds, self._catalogue, now)

    def check_writes(self, environment: Mapping[str, str]) -> None:
        """Check that two writers cannot overwrite each other. Raises: ConditionalWritesMissing."""
        check_conditional_writes(self._location, environment)

    def stage(
        self,
        folder: Path,
        *,
        tenant: str = LOCAL_TENANT,
        name: str | None = None,
        tags: Collection[str] = (),
        template: str | None = None,
        visibility: Visibility = "public",
        keeps_visibility: bool = False,
        source: str | None = None,
        module_shapes: Shapes | None = None,
    ) -> Staged:
        """The folder's version, checked, its blobs written and held until `commit` or `discard`.

        Name and source default to the folder's name. `module_shapes`: (out, in) of each linear layer an adapter may
        change; None = not checked. `keeps_visibility`: `visibility` is for a new name only, an update stays as the live
        version is. Raises: AdapterRefused with every reason; then nothing was written.
        """
        label = Label(folder.name if name is None else name, tenant, tuple(sorted(set(tags))), template, visibility)
        admitted = check_folder(
            folder,
            label,
            accepts_base=self._accepts_base,
            module_shapes=module_shapes,
            limits=self._limits,
        )
        weights = WeightsBlob(admitted.modules)
        weights_digest = weights.digest()
        samples = write_samples(admitted.samples) if admitted.samples else None
        record = staged_record(
            label,
            admitted,
            weights_digest=weights_digest,
            samples_digest=None if samples is None else digest_of(samples),
            num_bytes=weights.num_bytes(),
            source=folder.name if source is None else source,
        )
        staged = self._held(record, lambda: self._write(weights_digest, weights, samples, admitted.samples))
        return replace(staged, keeps_visibility=keeps_visibility)

    def restage(self, record: AdapterRecord) -> Staged:
        """A version the catalogue keeps as if it were staged again: held, its blobs there, its samples read.

        Its name keeps the visibility it has when it is committed, whatever the version had.
        Raises: AdapterNotFound when its blobs are gone; BlobCorrupted.
        """
        bare = replace(record, embedding=None, probe_shift=None, actor="", generation=0, approved=False)
        return replace(self._held(bare, lambda: self._find(record)), keeps_visibility=True)

    def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Embedding | None],
        probe_shifts: Sequence[float | None],
        actor: str,
        precondition: Precondition = "any",
        share: TenantQuota | None = None,
        commit_id: str | None = None,
    ) -> int:
        """Make all of `staged` live, and return the generation; `embeddings` and `probe_shifts` run along with it.

        What is live already, the same in digest, visibility and encoder, is not written again. On success the holds
        have ended; after an error they stand, for another try or `discard`.
        `standing`: what the versions must be in the newest state; "live" needs no hold, and changes no visibility.
        `share`: what their tenant may hold at most, judged on the newest state.
        `commit_id`: a repeated call under the same id commits nothing, and returns the generation of the first.
        Raises: PublicNameTaken; QuotaExceeded; VersionConflict; AdapterNotFound when it was staged so long ago that
        its hold died and its blobs went, or is not kept although it should be.
        """
        created_at = self._now()
        records = [
            replace(item.record, embedding=embedding, probe_shift=shift, actor=actor, created_at=created_at)
            for item, embedding, shift in zip(staged, embeddings, probe_shifts, strict=True)
        ]
        held = () if precondition == "live" else staged
        renewed = [self.restage(item.record) for item in held if not self._holds.is_safe(item.hold)]
        keeping = {(i.ref.tenant, i.ref.name) for i in staged if i.keeps_visibility or precondition == "live"}
        generation = self._catalogue.commit(
            lambda snapshot: publish_events(snapshot, records, precondition, keeping=keeping, share=share), commit_id
        )
        self._end_quietly([item.hold for item in (*staged, *renewed)])
        return generation

    def discard(self, staged: Sequence[Staged]) -> None:
        """These will not be committed: their holds have ended, and the blobs nothing else needs are gone."""
        self._holds.end([item.hold for item in staged])
        self.sweep([digest for item in staged for digest in item.record.blobs])

    def withdraw(self, tenant: str, names: Sequence[str], actor: str, commit_id: str | None = None) -> Withdrawn:
        """Withdraw all of `names` with all their versions, or none. Their blobs stay until they are swept.

        `commit_id`: a repeated call under the same id withdraws nothing, and returns the generation of the first.
        Raises: AdapterNotFound for a name that is not live, VersionConflict.
        """
        keys, at = [(tenant, name) for name in names], self._now()
        gone: list[AdapterRecord] = []

        def events(snapshot: Snapshot) -> list[Event]:
            wanted = withdraw_events(snapshot, keys, actor, at)
            gone[:] = [record for key in dict.fromkeys(keys) for record in snapshot.versions(key)]
            return wanted

        generation = self._catalogue.commit(events, commit_id)
        return Withdrawn(generation, tuple(gone))

    def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int:
        """The generation at which the name is so. Raises: AdapterNotFound, PublicNameTaken, VersionConflict."""
        at = self._now()
        return self._catalogue.commit(lambda snap: visibility_events(snap, (tenant, name), visibility, actor, at))

    def approve(self, refs: Sequence[AdapterRef], actor: str) -> int:
        """The generation from which `auto` may choose these public versions for every tenant.

        Raises: AdapterNotFound for one that is not the live version, or not public; VersionConflict.
        """
        at = self._now()
        return self._catalogue.commit(lambda snapshot: approve_events(snapshot, refs, actor, at))

    def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int:
        """The generation at which what is still live of these has its embedding, for an encoder to be activated."""
        return self._catalogue.commit(lambda snapshot: embed_events(snapshot, embeddings))

    def activate_encoder(self, model: str, identity: str, actor: str) -> int:
        """The generation from which the pool is searched by this encoder's embeddings.

        Raises: EncoderIncomplete when a live adapter with samples has no embedding by it.
        """
        encoder, at = ActiveEncoder(model, identity), self._now()
        return self._catalogue.commit(lambda snapshot: activate_events(snapshot, encoder, actor, at))

    def load(self, weights_digest: str) -> bytes:
        """The weights' canonical bytes, for `decode_weights`. Raises: AdapterNotFound, BlobCorrupted."""
        return self._blobs.get(weights_digest)

    def samples(self, samples_digest: str) -> tuple[Sample, ...]:
        """Raises: AdapterNotFound, BlobCorrupted."""
        return parse_samples(self._blobs.get(samples_digest))

    def snapshot(self) -> Snapshot:
        return self._catalogue.snapshot()

    def snapshot_at(self, generation: int) -> Snapshot:
        """The pool as it was at `generation`; blobs of what went since may be gone."""
        return self._catalogue.snapshot_at(generation)

    def sweep(self, digests: Collection[str]) -> list[str]:
        """Remove those blobs that no kept version refers to and no publish holds; what was removed."""
        return self._upkeep.sweep(digests)

    def gc(self, retention_s: float) -> Collected:
        """Remove all that nothing needs and that is older than `retention_s`: what crashes and rivals left."""
        return self._upkeep.gc(retention_s)

    def to_verify(self, tenant: str | None = None) -> dict[str, AdapterRef]:
        """Return the blobs that kept versions need, each with one that needs it; only those `tenant` sees, if given."""
        return self._upkeep.to_verify(tenant)

    def verify(self, wanted: Mapping[str, AdapterRef] | None = None) -> Iterator[BlobCheck]:
        """Read and hash these blobs again; None: all that kept versions need."""
        return self._upkeep.verify(self.to_verify() if wanted is None else wanted)

    def _held(self, record: AdapterRecord, prepare: Callable[[], tuple[Sample, ...]]) -> Staged:
        hold = self._holds.take(record.blobs)
        try:
            return Staged(record, prepare(), hold)
        except BaseException:
            self._end_quietly([hold])
            raise

    def _write(
        self, digest: str, weights: WeightsBlob, samples_file: bytes | None, samples: tuple[Sample, ...]
    ) -> tuple[Sample, ...]:
        self._blobs.put_pieces(digest, weights.pieces)
        if samples_file is not None:
            self._blobs.put(samples_file)
        return samples

    def _find(self, record: AdapterRecord) -> tuple[Sample, ...]:
        if not all(digest in self._blobs for digest in record.blobs):
            raise AdapterNotFound(str(record.ref))
        return self.samples(record.samples_digest) if record.samples_digest is not None else ()

    def _end_quietly(self, holds: Collection[str]) -> None:
        """Hold nothing any more; what cannot be removed now dies by itself."""
        try:
            self._holds.end(holds)
        except StoreUnavailable as exc:
            logger.warning("%d holds are left to gc: %s", len(holds), exc.cause)
