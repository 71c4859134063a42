"""Maintenance of a store: sweep unused blobs, collect the remains of crashes, verify the blobs in use."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta

from lora_store.adapter import AdapterRef
from lora_store.blobs import BlobFile, BlobStore
from lora_store.catalogue import Catalogue
from lora_store.errors import AdapterNotFound, BlobCorrupted, StoreDamaged, StoreIsNewer
from lora_store.files import Files, StoredFile
from lora_store.leases import INTENT_S, Leases
from lora_store.snapshot import Snapshot
from lora_store.uploads import Uploads

logger = logging.getLogger(__name__)

_COLLECTING = "delete unused files of the adapter store"
_NUM_READERS = 8
_CHECKED_TOGETHER = 64
TABLE_RETENTION_S = 3600.0
PROJECTIONS = "projections"  # the folder of the encoders' projections and of what belongs to them
PROJECTION_RETENTION_S = 3600.0
UPLOAD_RETENTION_S = 3600.0  # longer than an upload may take


@dataclass(frozen=True, slots=True)
class Collected:
    """The blobs and projections that a garbage collection deleted."""

    num_blobs: int
    num_bytes: int
    num_projections: int = 0


@dataclass(frozen=True, slots=True)
class BlobCheck:
    """The result of verifying one blob, with one adapter that uses it. `problem` is None if the blob is intact."""

    digest: str
    ref: AdapterRef
    problem: str | None


@dataclass(frozen=True, slots=True)
class Verified:
    """Progress of a verification: `done` of `total` blobs were hashed, the last one with this result."""

    done: int
    total: int
    check: BlobCheck


class GarbageCollector:
    """Deletes and verifies the blobs of a store, and deletes projections. Raises: StoreUnavailable."""

    def __init__(
        self,
        blobs: BlobStore,
        leases: Leases,
        catalogue: Catalogue,
        projections: Files,
        uploads: Uploads,
        now: Callable[[], datetime],
    ) -> None:
        self._blobs, self._leases, self._catalogue, self._now = blobs, leases, catalogue, now
        self._projections, self._uploads = projections, uploads

    def sweep(self, digests: Collection[str]) -> list[str]:
        """Delete those blobs that no kept version uses and no publish has leased. Return the digests deleted.

        Delete none where a newer release may use them in a way that this one does not know; its `gc` will.
        """
        removed: list[str] = []
        try:
            self._catalogue.check_known(_COLLECTING)
        except StoreIsNewer as exc:
            logger.info("%d blobs are left to gc: %s", len(digests), exc)
            return removed
        wanted = list(dict.fromkeys(digests))
        self._leases.sweep(wanted, self._referenced, lambda free: removed.extend(self._blobs.delete(free)))
        return removed

    def gc(self, retention_s: float) -> Collected:
        """Delete unused blobs and files older than `retention_s`, as crashes and rival writers leave them.

        Keep the table's own files, projections and parts of uploads for at least an hour: a rival may have written one
        that it has not committed yet.
        Raises: StoreIsNewer if a newer release may use what this one would delete; StoreDamaged if the catalogue is
        younger than a blob that it does not list: it cannot be the catalogue of these blobs.
        """
        now = self._now()
        self._catalogue.check_known(_COLLECTING)
        self._leases.delete_expired()
        self._uploads.delete_old(now - timedelta(seconds=max(retention_s, UPLOAD_RETENTION_S)))
        old = [file for file in self._blobs.files() if file.written_at <= now - timedelta(seconds=retention_s)]
        needed = self._referenced()
        whole = [file for file in old if file.is_whole and file.digest not in needed]
        self._check_age(whole)
        removed = self._remove(whole, self._referenced)
        removed += self._remove([file for file in old if not file.is_whole], frozenset)  # no record uses these
        self._catalogue.vacuum(now - timedelta(seconds=max(retention_s, TABLE_RETENTION_S)))
        unused = self._delete_projections(now - timedelta(seconds=max(retention_s, PROJECTION_RETENTION_S)))
        num_bytes = sum(file.num_bytes for file in removed) + sum(file.num_bytes for file in unused)
        return Collected(sum(file.is_whole for file in removed), num_bytes, len(unused))

    def _check_age(self, unused: Sequence[BlobFile]) -> None:
        """Raises: StoreDamaged if one of these blobs was written before the catalogue was created."""
        before = self._catalogue.created_at - timedelta(seconds=INTENT_S)  # as far as clocks may differ
        older = [file for file in unused if file.written_at < before]
        if older:
            raise StoreDamaged(
                "the catalogue",
                f"was created after {len(older)} of the blobs that it does not list, such as {older[0].name}:"
                " it is not the catalogue of these blobs",
                "restore the one that lists them, or delete these blobs by hand; nothing was deleted",
            )

    def _delete_projections(self, before: datetime) -> list[StoredFile]:
        """Delete the projections written before that time that no embedding uses, and vectors of unused encoders.

        The catalogue is read first. A reindex writes its projection, new or not, before the catalogue mentions it, so
        one that it begins meanwhile is young when the files are listed.
        """
        stems = used_stems(self._catalogue.snapshot())
        old = [file for file in self._projections.entries() if file.written_at <= before]
        unused = [file for file in old if find_stem(file.name) not in stems]
        self._projections.delete([file.name for file in unused])
        return unused

    def to_verify(self, tenant: str | None = None) -> dict[str, AdapterRef]:
        """Return the blobs that kept versions use, each with one such version; only those `tenant` sees, if given."""
        snapshot, owners = self._catalogue.snapshot(), dict[str, AdapterRef]()
        for record in (record for key in snapshot.records for record in snapshot.versions(key)):
            if tenant is None or record.is_visible_to(tenant):
                for digest in record.blobs:
                    owners.setdefault(digest, record.ref)
        return owners

    def verify(self, wanted: Mapping[str, AdapterRef]) -> Iterator[BlobCheck]:
        """Read and hash each of these blobs. Yield one result per blob."""
        pairs, pool = list(wanted.items()), ThreadPoolExecutor(_NUM_READERS)
        try:
            for start in range(0, len(pairs), _CHECKED_TOGETHER):
                checks = pool.map(self._check, pairs[start : start + _CHECKED_TOGETHER])
                yield from (check for check in checks if check is not None)
        finally:  # a caller that leaves does not wait for blobs that are being read
            pool.shutdown(wait=False, cancel_futures=True)

    def _check(self, wanted: tuple[str, AdapterRef]) -> BlobCheck | None:
        digest, ref = wanted
        try:
            self._blobs.check(digest)
        except AdapterNotFound:
            missing = BlobCheck(digest, ref, "is missing")
            return missing if digest in self._referenced() else None  # withdrawn meanwhile
        except BlobCorrupted as exc:
            return BlobCheck(digest, ref, str(exc))
        return BlobCheck(digest, ref, None)

    def _remove(self, files: Sequence[BlobFile], referenced: Callable[[], Collection[str]]) -> list[BlobFile]:
        by_digest = defaultdict(list)
        for file in files:
            by_digest[file.digest].append(file)

        def delete(free: Sequence[str]) -> None:
            self._blobs.delete_files([file for digest in free for file in by_digest[digest]])

        free = self._leases.sweep(list(by_digest), referenced, delete)
        return [file for digest in free for file in by_digest[digest]]

    def _referenced(self) -> Set[str]:
        return self._catalogue.snapshot().referenced()


def used_stems(snapshot: Snapshot) -> frozenset[str]:
    """Return the stems of the files that the encoders of this snapshot need: see `find_stem`."""
    used = snapshot.encoders()
    return used | {identity.partition("+")[0] for identity in used}


def find_stem(name: str) -> str:
    """Return the identity in the name of a projection, or that of the encoder in the name of its ordinary vectors.

    A write in progress begins with a dot, so no encoder has it.
    """
    stem = name.removesuffix(".safetensors")
    return stem.partition("-")[0] if stem.endswith(".ordinary") else stem
