"""A whole pool as files: in a store, or in an archive that any store can import.

An archive is a tar file with a store's blobs and projections under the names they have there, and then the state of
its catalogue at one generation as one Parquet file. Whatever lacks that last file is not complete.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lora_store.catalogue import CATALOGUE, Catalogue
from lora_store.data_files import rows_in
from lora_store.errors import AdapterNotFound, StoreDamaged, StoreIsNewer
from lora_store.events import ActivateEncoder, Approve, Event, Publish, SetName, make_table, read_dated_events
from lora_store.files import Files
from lora_store.garbage_collection import PROJECTIONS, find_stem, used_stems
from lora_store.location import Location
from lora_store.names import policy_digest
from lora_store.records import AdapterRecord
from lora_store.snapshot import Key, Snapshot
from lora_store.staging import make_label, version_digest
from lora_store.table_format import OURS, TableFormat
from lora_store.validation import Label

CATALOGUE_FILE = "catalogue.parquet"
PART_BYTES = 8 << 20
UNFINISHED = "unfinished-export"  # a file in a store until an export to it is complete
_METADATA = b"loraretriever.pool"
_PROJECTION = re.compile(rf"{PROJECTIONS}/[A-Za-z0-9_-][A-Za-z0-9._+-]{{0,250}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
COPIED_BY = "copy"  # the author of an encoder's activation in a copy


def blob_file(digest: str) -> str:
    """Return the name of a blob's file in a store and in an archive."""
    return f"blobs/{digest[:2]}/{digest}"


def is_projection(name: str) -> bool:
    """Return whether a file has this name in a store only if it belongs to an encoder."""
    return _PROJECTION.fullmatch(name) is not None


def check_finished(store: Location) -> None:
    """Check that no export to this store was interrupted. Its catalogue may be there and lack all adapters.

    Raises: StoreDamaged.
    """
    if Files(store).contains(UNFINISHED):
        raise StoreDamaged(
            f"{store.uri}/{UNFINISHED}",
            "is there: an export to this store was interrupted",
            "repeat the export, which continues it, or name another store",
        )


@dataclass(frozen=True, slots=True)
class PoolState:
    """The content of a pool at one generation. `projections`: the names of the files that its encoders need."""

    snapshot: Snapshot
    projections: tuple[str, ...] = ()

    @classmethod
    def of_store(cls, snapshot: Snapshot, files: Files) -> PoolState:
        """Return the state of a store at this snapshot. `files`: those below the store's location."""
        stems = used_stems(snapshot)
        names = [file.name.rpartition("/")[2] for file in files.entries(PROJECTIONS)]
        return cls(snapshot, tuple(sorted(name for name in names if find_stem(name) in stems)))

    def of_tenant(self, tenant: str) -> PoolState:
        """Return the tenant's part of the state."""
        return self._only([key for key in self.snapshot.records if key[0] == tenant], tenant)

    def usable_by(self, tenant: str) -> PoolState:
        """Return the part that requests of the tenant may use."""
        whole = self.snapshot
        part = self._only([record.ref.key for record in whole.visible_to(tenant)], tenant).snapshot
        older = {key: tuple(r for r in kept if r.is_visible_to(tenant)) for key, kept in part.previous.items()}
        names = {key: kept for key in whole.names if (kept := whole.policies(tenant, "/".join(key)))}
        return replace(self, snapshot=replace(part, previous=older, names=names))

    def _only(self, keys: Collection[Key], tenant: str | None = None) -> PoolState:
        """Return the part that belongs to these adapters, and the rankings and model names of the tenant."""
        whole = self.snapshot
        records = {key: whole.records[key] for key in keys}
        older = {key: whole.previous[key] for key in keys if key in whole.previous}
        rankings = {owner: ranks for owner, ranks in whole.rankings.items() if owner == tenant}
        names = {key: kept for key, kept in whole.names.items() if key[0] == tenant}
        part = Snapshot(whole.generation, records, older, whole.encoder, rankings=rankings, names=names)
        return replace(self, snapshot=part)

    def named(self, names: Sequence[str]) -> PoolState:
        """Return the part with these names, as `find` takes them; all of it for none. Raises: ValueError."""
        refs = [self.find(name).ref for name in names]
        return self._only([ref.key for ref in refs]) if names else self

    def find(self, name: str) -> AdapterRecord:
        """Return the live version that is meant by `name` or `owner/name`. Raises: ValueError."""
        owner, _, bare = name.rpartition("/")
        found = [record for key, record in self.snapshot.records.items() if key[1] == bare and owner in ("", key[0])]
        if not found:
            raise ValueError(f"no adapter {name!r} in this pool")
        if len(found) > 1:
            owners = " or ".join(sorted(f"{record.ref.tenant}/{bare}" for record in found))
            raise ValueError(f"{len(found)} tenants have an adapter {name!r}: say {owners}")
        return found[0]

    def versions(self) -> list[AdapterRecord]:
        """Return all versions of all names."""
        return [record for key in self.snapshot.records for record in self.snapshot.versions(key)]

    def blobs(self) -> dict[str, int | None]:
        """Return the digests of all blobs with their sizes; None for samples, whose size is not recorded."""
        kept = self.versions()
        samples = {record.samples_digest: None for record in kept if record.samples_digest is not None}
        return samples | {record.weights_digest: record.num_bytes for record in kept}

    def to_parquet(self) -> bytes:
        """Return the state as one file."""
        snapshot = self.snapshot
        facts = {"generation": snapshot.generation, "format": OURS.to_json(), "projections": self.projections}
        rows = make_table(list(state_events(snapshot, datetime.now(UTC))), snapshot.generation)
        sink = pa.BufferOutputStream()
        table = rows.replace_schema_metadata({_METADATA: json.dumps(facts)})
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_page_checksum=True)
        return bytes(sink.getvalue())

    @classmethod
    def from_parquet(cls, data: bytes) -> PoolState:
        """Return the state from the bytes of `to_parquet`. Raises: StoreIsNewer; ValueError if they were changed."""
        try:
            metadata = pq.read_schema(pa.BufferReader(data)).metadata
            facts = json.loads(metadata[_METADATA])
            TableFormat.in_metadata({"loraretriever.format": facts["format"]}).check_readable()
            rows, has_unknown = rows_in(data)
            if has_unknown:
                raise StoreIsNewer("import the pool", json.loads(facts["format"])["release"])
            events = read_dated_events(rows, after=0)
            state = cls(Snapshot(0, {}).after_dated(events, facts["generation"]), tuple(facts["projections"]))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ValueError(f"{CATALOGUE_FILE} cannot be read: {exc}") from exc
        if not all(is_projection(f"{PROJECTIONS}/{name}") for name in state.projections):
            raise ValueError(f"{CATALOGUE_FILE} names a projection that is no file's name")
        state.check_digests()
        return state

    def check_digests(self) -> None:
        """Check that each version and policy is what its digest says, under a valid name. Raises: ValueError."""
        for key in self.snapshot.records:
            for record in self.snapshot.versions(key):
                label = make_label(record)
                if problem := next(label.problems(), None):
                    raise ValueError(problem)
                wanted = version_digest(label, record.weights_digest, record.samples_digest, record.base_model)
                if wanted != record.ref.digest or not all(map(_DIGEST.fullmatch, record.blobs)):
                    raise ValueError(f"{record.ref} is not what its digest says: the copy was changed or damaged")
        for key, kept in self.snapshot.names.items():
            if problem := next(Label(key[1], key[0]).problems(), None):
                raise ValueError(f"model name: {problem}")
            for named in kept:
                if policy_digest(named.policy) != named.ref.digest:
                    raise ValueError(f"{named.ref} is not what its digest says: the copy was changed or damaged")


def state_events(snapshot: Snapshot, at: datetime) -> Iterator[Event]:
    """Yield events that lead from an empty pool to this state, without generations and without a reindex that runs."""
    if snapshot.encoder is not None:
        yield ActivateEncoder(snapshot.encoder.model, snapshot.encoder.identity, COPIED_BY, at)
    for key in sorted(snapshot.records):
        yield from version_events(snapshot.versions(key))
    for ranks in snapshot.rankings.values():
        yield from ranks
    for kept in snapshot.names.values():
        yield from (SetName(named) for named in reversed(kept))


def version_events(versions: tuple[AdapterRecord, ...]) -> Iterator[Event]:
    """Yield events that publish the versions of one name, given the live one first, as they are."""
    live = versions[0]
    earlier = [record for record in versions[1:] if not record.is_offered]
    for record in (*reversed(earlier), live):
        yield Publish(record)
        if record.approved:
            yield Approve(record.ref, record.actor, record.created_at)
    yield from (Publish(replace(record, trial=live.trial)) for record in versions if record.is_offered)


class PoolSource(Protocol):
    """A pool that can be copied."""

    def state(self) -> PoolState:
        """Return its newest state. Raises: StoreIsNewer if this release does not know all of it."""
        ...

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a file by its name in a store. Raises: AdapterNotFound if it is gone."""
        ...


class StoredPool:
    """The pool of a store, which servers may use meanwhile. Raises: ValueError if there is none; StoreDamaged."""

    def __init__(self, uri: str) -> None:
        def refuse() -> None:
            raise ValueError(f"{uri}: there is no pool")

        location = Location.of_store(uri)
        check_finished(location)
        self._catalogue, self._files = Catalogue(location.child(CATALOGUE), before_creating=refuse), Files(location)

    def state(self) -> PoolState:
        self._catalogue.check_known("copy the pool")
        return PoolState.of_store(self._catalogue.snapshot(), self._files)

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        return _found(name, (part.data for part in self._files.read_parts(name, PART_BYTES)))


class ArchivedPool:
    """The pool in an archive. Raises: ValueError for a file that is none, or is not complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with tarfile.open(path, "r:") as archive:
                members = [member for member in archive if member.isreg()]
        except tarfile.TarError as exc:
            raise ValueError(f"{path}: is not a tar file, or was cut off: {exc}") from exc
        self._places: Mapping[str, tuple[int, int]] = {item.name: (item.offset_data, item.size) for item in members}
        if CATALOGUE_FILE not in self._places:
            raise ValueError(f"{path}: has no {CATALOGUE_FILE}: it is no export of a pool, or it was not completed")

    def state(self) -> PoolState:
        return PoolState.from_parquet(b"".join(self.read(CATALOGUE_FILE)))

    def read(self, name: str) -> Iterator[bytes | memoryview]:
        return _found(name, self._parts(name))

    def _parts(self, name: str) -> Iterator[bytes]:
        if name not in self._places:
            return
        start, num_left = self._places[name]
        with self._path.open("rb") as file:
            file.seek(start)
            while num_left and (part := file.read(min(num_left, PART_BYTES))):
                num_left -= len(part)
                yield part


def _found(name: str, parts: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the parts. Raises: AdapterNotFound if there are none."""
    first = next(parts, None)
    if first is None:
        raise AdapterNotFound(name.rpartition("/")[2])
    yield first
    yield from parts
