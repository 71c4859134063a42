"""Copy a pool: export it to a new store or an archive, or import it into a store that may have adapters."""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal
from uuid import uuid4

from lora_store.blobs import BlobStore
from lora_store.catalogue import CATALOGUE, Catalogue
from lora_store.errors import AdapterNotFound, BlobCorrupted, LoraStoreError, StoreDamaged, StoreUnavailable
from lora_store.event_table import create_table
from lora_store.events import Event, SetName
from lora_store.files import Files
from lora_store.garbage_collection import PROJECTIONS
from lora_store.leases import Leases
from lora_store.location import Location
from lora_store.names import NamedPolicy
from lora_store.pool_files import (
    CATALOGUE_FILE,
    COPIED_BY,
    UNFINISHED,
    PoolSource,
    PoolState,
    blob_file,
    check_finished,
    state_events,
    version_events,
)
from lora_store.records import AdapterRecord
from lora_store.rules import activate_events, find_owner
from lora_store.snapshot import Key, Snapshot

Conflict = Literal["refuse", "skip", "replace"]
"""The fate of a name whose live version in the store is another one: refuse all, leave it, publish a new version."""
Move = tuple[tuple[AdapterRecord, ...], str | None]
"""The versions of a name, the live one first, and the digest that is live in the store until they are imported."""
Report = Callable[[int, int], object]
"""Report how much is done, and of how much."""
_NUM_THREADS = 8
_TOGETHER = 32  # names per commit of an import
_NUM_SHOWN = 10


def export_pool(
    source: PoolSource,
    target: ArchiveTarget | StoreTarget,
    names: Sequence[str] = (),
    progress: Report = lambda done, total: None,
) -> PoolState:
    """Copy these adapters of the source, or all, as of one generation, and return what was copied.

    The files come first. If one is gone, because its adapter was withdrawn meanwhile, a newer generation is exported.
    Raises: StoreDamaged for a damaged source; the errors of the source and the target.
    """
    state, done = source.state().named(names), set[str]()
    while True:
        files = _list_files(state)
        missing = [name for name in files if name not in done]

        def copy(name: str) -> str:
            target.add(name, partial(read_checked, source, name))
            return name

        with ThreadPoolExecutor(target.num_threads) as pool:
            try:
                for name in pool.map(copy, missing):
                    done.add(name)
                    progress(len(done), len(files))
                break
            except AdapterNotFound as gone:
                state = source.state().named(names)
                if any(name.endswith(gone.wanted) for name in _list_files(state)):
                    raise _name_users(state, gone.wanted, "is missing", gone) from gone
            except BlobCorrupted as bad:
                raise _name_users(state, bad.digest, f"is corrupted: its bytes hash to {bad.found}", bad) from bad
    target.finish(state)
    return state


def _list_files(state: PoolState) -> list[str]:
    return [*(f"{PROJECTIONS}/{name}" for name in state.projections), *map(blob_file, state.blobs())]


def _name_users(state: PoolState, digest: str, problem: str, error: LoraStoreError) -> LoraStoreError:
    """Return an error that names the versions that need this blob, or the given one if it is no blob."""
    users = [str(record.ref) for record in state.versions() if digest in record.blobs]
    if not users:
        return error
    rest = f" and {len(users) - _NUM_SHOWN} more" if len(users) > _NUM_SHOWN else ""
    return StoreDamaged(
        f"the file {blob_file(digest)} of {', '.join(users[:_NUM_SHOWN])}{rest}",
        problem,
        "publish it again with the same weights and samples, or import it from a backup; --adapter NAME copies others",
    )


def read_checked(source: PoolSource, name: str) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file. Raises: BlobCorrupted at the end, if they do not hash to the name of a blob."""
    hashed = hashlib.sha256()
    for part in source.read(name):
        hashed.update(part)
        yield part
    digest, found = name.rpartition("/")[2], hashed.hexdigest()
    if name.startswith("blobs/") and found != digest:
        raise BlobCorrupted(digest, found)


class ArchiveTarget:
    """A tar file, which gets its name when it is finished, if no other file has it. Use it as a context manager."""

    num_threads = 1

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.{uuid4().hex}.partial")
        if path.exists():
            raise ValueError(f"{path}: exists; name a new archive")
        self._partial.touch(mode=0o600, exist_ok=False)
        self._archive = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> ArchiveTarget:
        return self

    def __exit__(self, *exc: object) -> None:
        self._archive.close()
        self._partial.unlink(missing_ok=True)

    def add(self, name: str, pieces: Callable[[], Iterator[bytes | memoryview]]) -> None:
        # before the header, since it may be gone or damaged
        with _read_whole(pieces, self._path.parent) as (file, num_bytes):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = num_bytes, int(time.time()), 0o600
            self._archive.addfile(entry, file)

    def finish(self, state: PoolState) -> None:
        self.add(CATALOGUE_FILE, lambda: iter([state.to_parquet()]))
        self._archive.close()
        Files(Location(str(self._path.parent))).flush([self._partial.name])
        try:
            self._path.touch(mode=0o600, exist_ok=False)  # some file systems of backups have no links
        except FileExistsError:
            raise ValueError(f"{self._path}: was written by another export meanwhile; name a new archive") from None
        self._partial.replace(self._path)


class StoreTarget:
    """A new store. No server opens it before it is complete. Files that it has are not copied again.

    Of several exports to it at once, the first one that commits completes it, and only that one deletes blobs.
    Raises: ValueError if it holds anything but an export that was interrupted.
    """

    num_threads = _NUM_THREADS

    def __init__(self, uri: str) -> None:
        self._uri, self._location = uri, Location.of_store(uri)
        self._files, self._blobs = Files(self._location), BlobStore(self._location.child("blobs"))
        if not self._files.contains(UNFINISHED):
            _require_empty(self._files, uri)
        elif self._files.entries(CATALOGUE) and Catalogue(self._location.child(CATALOGUE)).snapshot().generation:
            self._files.delete([UNFINISHED])
            raise ValueError(f"{uri}: holds a finished export; name a new place")
        self._files.write(UNFINISHED, b"")

    def add(self, name: str, pieces: Callable[[], Iterator[bytes | memoryview]]) -> None:
        _put(self._blobs, self._files, name, pieces)

    def finish(self, state: PoolState) -> None:
        """Raises: ValueError if another export completed the store meanwhile."""
        events = list(state_events(state.snapshot, datetime.now(UTC)))

        def commit_first(newest: Snapshot) -> list[Event]:
            if newest.generation:
                raise ValueError(f"{self._uri}: holds another export, which was finished meanwhile; name a new place")
            return events

        create_table(self._location.child(CATALOGUE), is_copy=True)  # else gc would take it for one of other blobs
        if Catalogue(self._location.child(CATALOGUE)).commit(commit_first):
            needed = state.blobs()
            self._blobs.delete([file.digest for file in self._blobs.files() if file.digest not in needed])
        self._files.delete([UNFINISHED])


def _require_empty(files: Files, uri: str) -> None:
    """Raises: ValueError if there is a pool, or what is left of a damaged one."""
    if files.entries(CATALOGUE):
        raise ValueError(f"{uri}: holds a pool; name a new place, or add to it with `loraretriever pool import`")
    if files.entries("blobs"):
        raise ValueError(f"{uri}: holds blobs but no catalogue: it may be a damaged pool; name a new place")


def _put(blobs: BlobStore, files: Files, name: str, pieces: Callable[[], Iterator[bytes | memoryview]]) -> None:
    """Store a file, unless there is such a blob. A damaged one changes nothing: a server may have stored it intact."""
    if name.startswith("blobs/"):
        blobs.put_pieces(name.rpartition("/")[2], pieces)
    else:
        files.write(name, b"".join(pieces()))


@contextmanager
def _read_whole(pieces: Callable[[], Iterator[bytes | memoryview]], folder: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Yield a temporary file in this folder with all the pieces, and its size. Raises: the errors of the pieces."""
    with TemporaryFile(dir=folder) as file:
        for piece in pieces():
            file.write(piece)
        num_bytes = file.tell()
        file.seek(0)
        yield file, num_bytes


def import_pool(
    source: PoolSource,
    uri: str,
    on_conflict: Conflict = "refuse",
    names: Sequence[str] = (),
    *,
    is_dry: bool = False,
    progress: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Add these adapters of the source, or all, to the store, with their versions. Servers may use it meanwhile.

    Return the store's `generation`, the names that are `new`, `equal`, `skipped` and `replaced`, the model names that
    are not imported, since the store has something else by that name (`names_left_out`), and `num_unembedded`: how many
    `auto` finds only after a reindex, since another encoder than the store's embedded them.
    A name whose live version is equal is left alone, so an import that was interrupted continues when it is repeated.
    `on_conflict`: for the other names that are live in the store. "replace" publishes the live version of the source as
    a new version. Raises: ValueError for conflicts that are refused, before anything is stored; BlobCorrupted;
    StoreDamaged.
    """
    state = source.state().named(names)
    state.check_digests()
    location = Location.of_store(uri)
    check_finished(location)
    is_there = bool(Files(location).entries(CATALOGUE))
    if not is_there:
        _require_empty(Files(location), uri)
    catalogue = Catalogue(location.child(CATALOGUE)) if is_there or not is_dry else None
    before = Snapshot(0, {}) if catalogue is None else catalogue.snapshot()
    moves, result = _plan(state.snapshot, before, on_conflict)
    damaged = _find_damaged(BlobStore(location.child("blobs")), before.referenced() & state.blobs().keys(), progress)
    active = _find_encoder(before) or _find_encoder(state.snapshot)
    generation, after = before.generation, before
    if not is_dry and catalogue is not None:
        generation = _Importer(source, state, location, catalogue).run(before, damaged, moves, active, progress)
        after = catalogue.snapshot()
    left_out = _names_left_out(state.snapshot, after)
    num_unembedded = sum(versions[0].encoder not in (None, active) for versions, _ in moves)
    return {
        "generation": generation,
        **result,
        "names_left_out": left_out,
        "num_unembedded": num_unembedded,
        "num_restored": len(damaged),
    }


def _find_damaged(blobs: BlobStore, wanted: Collection[str], progress: Report) -> list[str]:
    """Return those of these blobs that are missing or do not hash to their name."""
    damaged = []

    def is_intact(digest: str) -> bool:
        try:
            blobs.check(digest)
        except (AdapterNotFound, BlobCorrupted):
            return False
        return True

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for done, (digest, intact) in enumerate(zip(wanted, pool.map(is_intact, wanted), strict=True), start=1):
            damaged += [] if intact else [digest]
            progress(done, len(wanted))
    return damaged


def _find_encoder(snapshot: Snapshot) -> str | None:
    """Return the identity of the encoder that a server of this pool uses, None if the pool does not decide."""
    if snapshot.encoder is not None:
        return snapshot.encoder.identity
    return snapshot.embedded_by()


def _plan(wanted: Snapshot, store: Snapshot, on_conflict: Conflict) -> tuple[list[Move], dict[str, list[str]]]:
    """Return what to import, and all names by what becomes of them. Raises: ValueError for conflicts."""
    names: dict[str, list[str]] = {kind: [] for kind in ("new", "equal", "skipped", "replaced")}
    moves: list[Move] = []
    refused = []
    for key in sorted(wanted.records):
        versions, live, shown = wanted.versions(key), store.records.get(key), "/".join(key)
        problem = _problem(store, versions[0])
        if live is not None and problem is None:
            names["equal"].append(shown)
        elif problem is None:
            names["new"].append(shown)
            moves.append((versions, None))
        elif on_conflict == "skip":
            names["skipped"].append(shown)
        elif on_conflict == "replace" and live is not None:
            names["replaced"].append(shown)
            moves.append((versions[:1], live.ref.digest))
        else:
            refused.append(f"{shown} {problem}")
    if refused:
        rest = f"; and {len(refused) - _NUM_SHOWN} more" if len(refused) > _NUM_SHOWN else ""
        raise ValueError(
            f"{len(refused)} of {len(wanted.records)} adapters are in conflict, and nothing was imported:"
            f" {'; '.join(refused[:_NUM_SHOWN])}{rest}. Say what to do with --conflict skip or replace"
        )
    return moves, names


def _problem(store: Snapshot, record: AdapterRecord) -> str | None:
    """Return why this version cannot be live under its name without a change of the store's adapters, or None."""
    ref = record.ref
    live, owner = store.records.get(ref.key), find_owner(store, ref.name, ref.tenant)
    if live is not None:
        return None if live.ref == ref else f"is live as another version, {live.ref.short_digest}"
    if ref.key in store.names:
        return "is called like a model name of the store"
    if record.visibility == "public" and owner != ref.tenant:
        return f"is public, and its name belongs to tenant {owner!r}"
    return None


def _is_free(store: Snapshot, key: Key, kept: Sequence[NamedPolicy]) -> bool:
    """Return whether the store has a place for a model name.

    A name that only its tenant may use is free although another tenant has something public by that name.
    """
    is_taken = key in store.names or key in store.records
    is_open = key[1] in store.public or key[1] in store.approved_names
    return not is_taken and not (is_open and any(named.approved for named in kept))


def _names_left_out(wanted: Snapshot, store: Snapshot) -> list[str]:
    """Return the model names that neither have a place in the store, nor are the same there."""
    return [
        "/".join(key)
        for key, kept in sorted(wanted.names.items())
        if not _is_free(store, key, kept) and (key not in store.names or store.names[key][0].ref != kept[0].ref)
    ]


class _Importer:
    """Copies files and commits names, some at a time, each under leases on their blobs."""

    def __init__(self, source: PoolSource, state: PoolState, location: Location, catalogue: Catalogue) -> None:
        self._source, self._state, self._catalogue = source, state, catalogue
        self._files, self._blobs = Files(location), BlobStore(location.child("blobs"))
        self._leases = Leases(location, lambda: datetime.now(UTC))

    def run(
        self, before: Snapshot, damaged: Collection[str], moves: Sequence[Move], active: str | None, progress: Report
    ) -> int:
        """Write the damaged blobs again, import the moves and return the generation."""
        at, snapshot = datetime.now(UTC), self._state.snapshot
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(self._restore, damaged))
        for name in self._state.projections:
            if not self._files.contains(f"{PROJECTIONS}/{name}"):
                self._copy(f"{PROJECTIONS}/{name}")
        if snapshot.encoder is not None and _find_encoder(before) is None:
            encoder = snapshot.encoder
            self._catalogue.commit(lambda newest: activate_events(newest, encoder, COPIED_BY, at))
        for start in range(0, len(moves), _TOGETHER):
            self._import(moves[start : start + _TOGETHER])
            progress(min(start + _TOGETHER, len(moves)), len(moves))
        return self._catalogue.commit(partial(self._others, active))

    def _restore(self, digest: str) -> None:
        lease = self._leases.acquire([digest])  # gc deletes no file that is being written under a lease
        try:
            self._copy(blob_file(digest))
        finally:
            self._leases.release([lease])

    def _others(self, active: str | None, newest: Snapshot) -> list[Event]:
        """Return the rankings of tenants that have none in the store, and the model names that are free there."""
        wanted = self._state.snapshot
        events: list[Event] = [
            rank
            for tenant, ranks in wanted.rankings.items()
            for rank in ranks
            if tenant not in newest.rankings and rank.ranking.encoder == active
        ]
        for key, kept in wanted.names.items():
            if _is_free(newest, key, kept):
                events += [SetName(named) for named in reversed(kept)]
        return events

    def _import(self, moves: Sequence[Move]) -> None:
        records = [record for versions, _ in moves for record in versions]
        digests = list(dict.fromkeys(digest for record in records for digest in record.blobs))
        leases: list[str] = []
        try:
            for record in records:
                leases.append(self._leases.acquire(record.blobs))
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                list(pool.map(self._copy, map(blob_file, digests)))
            self._catalogue.commit(partial(self._events, moves))
            if missing := self._blobs.missing(digests):
                raise StoreUnavailable(
                    f"{len(missing)} blobs were deleted while they were imported: withdraw their adapters, import again"
                )
        finally:
            self._leases.release(leases)

    def _copy(self, name: str) -> None:
        _put(self._blobs, self._files, name, partial(read_checked, self._source, name))

    def _events(self, moves: Sequence[Move], newest: Snapshot) -> list[Event]:
        """Return the events of these moves. Raises: ValueError if the store's names changed since they were planned."""
        events: list[Event] = []
        for versions, digest in moves:
            new = versions[0]
            live = newest.records.get(new.ref.key)
            has_changed = (None if live is None else live.ref.digest) != digest
            if has_changed or (live is None and _problem(newest, new)):
                raise ValueError(f"{new.ref} or its name was published while it was imported; import again")
            events += version_events(versions if live is None else (_make_successor(new, live),))
        return events


def _make_successor(record: AdapterRecord, live: AdapterRecord) -> AdapterRecord:
    """Return the version as it replaces the live one: who may use the adapter, and whether it is listed, stays."""
    expires_at = record.expires_at if live.is_unlisted else None
    now = datetime.now(UTC)
    return replace(record, trial=None, live_since=now, visibility=live.visibility, expires_at=expires_at)
