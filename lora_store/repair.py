"""The repair of a damaged catalogue, in a folder or a bucket that no server uses meanwhile.

Whole files stay as they are. A new version of the table lists the whole data files, and rows that only files outside
the table still have. Damaged files are moved to a folder of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake import Schema as DeltaSchema
from deltalake.transaction import AddAction

from lora_store.catalogue import CATALOGUE, Catalogue
from lora_store.data_files import all_columns_in, make_commit, write_rows
from lora_store.errors import StoreDamaged
from lora_store.event_table import create_table
from lora_store.events import SCHEMA, Fold, fold_generation, is_of_fold, is_whole_fold, make_table
from lora_store.files import Files, short_cause, store_errors
from lora_store.location import Location
from lora_store.table_format import COLUMN, OURS, TableFormat
from lora_store.table_log import (
    EMPTY,
    LAST_CHECKPOINT,
    LOG,
    MISSING,
    TableLog,
    checkpoint_name,
    commit_name,
    read_log,
)

_FOLD_FILE = re.compile(r"fold-0*(\d+)-")


@dataclass(frozen=True, slots=True)
class Repaired:
    """The outcome of a repair. `damaged`: the problem of each damaged file. `lost`: one sentence for each loss.

    `restored`: the generations whose rows were found outside the table. `aside`: where the damaged files are now.
    """

    generation: int
    num_adapters: int
    damaged: Mapping[str, str]
    restored: tuple[int, ...]
    lost: tuple[str, ...]
    aside: str


@dataclass
class _Found:
    """The files in the location of the table. `rows`: those of each whole data file, oldest file first."""

    log: TableLog
    live: dict[str, int] = field(default_factory=dict)  # data files of the table, with the version that added them
    known: set[str] = field(default_factory=set)  # data files that were ever part of the table
    rows: dict[str, pa.Table] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    appended: set[int] = field(default_factory=set)  # versions that the log says were appends
    empty_generations: set[int] = field(default_factory=set)  # versions that the log says have no rows of their own

    @property
    def is_log_lost(self) -> bool:
        """Whether the log no longer says what the table is: its beginning is gone, and no checkpoint is whole."""
        return not any(self.log.all_actions("metaData"))

    def is_suspect(self, generation: int) -> bool:
        """Return whether the log no longer says which data file this generation added."""
        return commit_name(generation) in self.damaged or self.is_log_lost


def repair(store: Location, now: datetime) -> Repaired | None:
    """Repair the catalogue of this store. Return None if it is whole; nothing is changed then.

    No other process may use the store meanwhile. Raises: StoreUnavailable; StoreIsNewer; StoreDamaged if nothing of a
    catalogue is left; ValueError if there is nothing at all.
    """
    location = store.child(CATALOGUE)
    files = Files(location)
    found = _look(files)
    if not found.damaged:
        return None
    if not found.rows and found.log.newest < 0:
        if not Files(store).entries():
            raise ValueError(f"{store.uri}: there is no pool")
        raise StoreDamaged(f"{location.uri}/{LOG}", MISSING, "no data file is left to repair it from; restore a copy")
    before = max((pc.max(rows["generation"]).as_py() or 0 for rows in found.rows.values()), default=0)
    restored = _restore(found)
    kept = [name for name in found.live if name in found.rows]
    version = max(found.log.newest, before) + 1
    aside = store.child(f"damaged-{now:%Y%m%d-%H%M%S}")
    broken = [name for name, problem in found.damaged.items() if problem != MISSING]
    existing = {name: data for name in broken if (data := files.read(name)) is not None}
    for name, data in existing.items():
        Files(aside).write(name, data)
    added = [AddAction(name, found.sizes[name], {}, 0, False, "{}") for name in kept]
    if restored.num_rows:
        added.append(write_rows(files, restored, "part", is_change=True))
    _write_log(files, version, make_commit(added, others=_table_lines(found)))
    files.delete(existing)
    snapshot = Catalogue(location).snapshot()
    return Repaired(
        generation=snapshot.generation,
        num_adapters=len(snapshot.records),
        damaged=found.damaged,
        restored=tuple(sorted(set(restored["generation"].to_pylist()))),
        lost=tuple(_losses(found, restored)),
        aside="" if not existing else aside.delta_uri if aside.is_local else aside.uri,
    )


def _look(files: Files) -> _Found:
    """Read the log and every data file."""
    log = read_log(files)
    found = _Found(log, damaged=dict(log.damaged))
    for version in sorted(log.actions):
        for action in log.actions[version]:
            if (add := action.get("add")) is not None:
                found.live[add["path"]] = version
                found.known.add(add["path"])
            if (remove := action.get("remove")) is not None:
                found.live.pop(remove["path"], None)
                found.known.add(remove["path"])
    _find_format(found).check_writable()
    entries = sorted(files.entries(), key=lambda file: file.written_at)
    _sort_commits(found, files, [file.name for file in entries])
    names = [file.name for file in entries if file.name.endswith(".parquet") and "/" not in file.name]
    found.damaged |= {name: MISSING for name in found.live if name not in names}
    for name in names:
        data = files.read(name) or b""
        try:
            found.rows[name] = all_columns_in([data], _find_schema(found, data))
            found.sizes[name] = len(data)
        except (pa.ArrowException, OSError) as exc:
            if name in found.live or found.is_log_lost:  # others are what a crash left
                found.damaged[name] = f"cannot be read: {short_cause(exc)}" if data else EMPTY
    return found


def _sort_commits(found: _Found, files: Files, names: Collection[str]) -> None:
    """Find out which versions appended rows and which did not, from the commits that are still there."""
    for version in range(found.log.newest + 1):
        if commit_name(version) not in names or commit_name(version) in found.damaged:
            continue
        lines = (files.read(commit_name(version)) or b"").splitlines()
        try:
            adds = [action["add"] for line in lines if "add" in (action := json.loads(line))]
        except ValueError:  # older than a checkpoint, which replaces it
            continue
        (found.appended if any(add["dataChange"] for add in adds) else found.empty_generations).add(version)


def _restore(found: _Found) -> pa.Table:
    """Return the rows that the table has lost and that a whole file outside of it still has.

    A generation of which the table has rows needs none. Rows of a file that was never part of the table count only if
    the log no longer says what that generation was: otherwise they are of a writer whom a rival preceded.
    """
    restored = [_without_broken_fold(found)]
    table = _joined([found.rows[name] for name in found.live if name in found.rows] + restored)
    outside = [name for name in found.rows if name not in found.live]
    states = [found.rows[name] for name in outside if name in found.known or found.is_log_lost]
    restored.append(_newest_fold(_joined([table, *states]), after=fold_generation(table)))
    fold = fold_generation(_joined([table, restored[-1]]))
    have = {*range(fold + 1), *table["generation"].to_pylist()}
    commits = set(table["commit_id"].to_pylist())
    last_tries = _last_tries([found.rows[name] for name in outside if name not in found.known])
    for name in sorted(outside, key=lambda name: name not in found.known):  # those once known first, each by age
        rows = found.rows[name]
        rows = rows.filter(pc.invert(is_of_fold(rows)))
        wanted = set()
        for generation, commit in zip(rows["generation"].to_pylist(), rows["commit_id"].to_pylist(), strict=True):
            is_free = found.is_suspect(generation) and commit not in commits - {None}
            is_free = is_free and last_tries.get(commit, generation) == generation
            if generation not in have and (name in found.known or is_free):
                wanted.add(generation)
        rows = rows.filter(pc.is_in(rows["generation"], pa.array(sorted(wanted), pa.int64())))
        have |= wanted
        commits |= set(rows["commit_id"].to_pylist())
        restored.append(rows)
    return _joined(restored)


def _newest_fold(rows: pa.Table, after: int) -> pa.Table:
    """Return the rows of the newest fold above generation `after`, each once; none if there is no such fold.

    A crash may leave a part of a fold that never replaced anything. Skip an incomplete fold whose versions are all in
    other rows up to its generation.
    """
    while (generation := fold_generation(rows)) > after:
        is_part = pc.and_(is_of_fold(rows), pc.equal(rows["generation"], generation))
        fold = _rows_once(rows.filter(is_part))
        if is_whole_fold(fold):
            return fold
        rows = rows.filter(pc.and_(pc.invert(is_part), pc.less_equal(rows["generation"], generation)))
        if not _versions(fold) <= _versions(rows):
            return fold
    return _joined([])


def _versions(rows: pa.Table) -> set[tuple[str, str, str]]:
    """Return the tenant, name and digest of each version that these rows publish or keep."""
    records = rows.filter(pc.is_valid(rows["weights_digest"]))
    return set(zip(*(records[name].to_pylist() for name in ("tenant", "name", "digest")), strict=True))


def _last_tries(tables: list[pa.Table]) -> dict[str, int]:
    """Return the newest generation of each commit id in these data files, which may not have been committed.

    A writer whom a rival preceded tries again at a later generation, so no older file of its commit was committed.
    """
    rows = _joined(tables)
    rows = rows.filter(pc.and_(pc.invert(is_of_fold(rows)), pc.is_valid(rows["commit_id"])))
    pairs = zip(rows["generation"].to_pylist(), rows["commit_id"].to_pylist(), strict=True)
    return {commit: generation for generation, commit in sorted(pairs)}


def _without_broken_fold(found: _Found) -> pa.Table:
    """If a part of the newest fold is damaged, take the fold out of the table where what it replaced is still there.

    Otherwise keep its whole parts. Return the row without which they would not be read.
    """
    broken = [int(match[1]) for name in found.live if name in found.damaged and (match := _FOLD_FILE.match(name))]
    newest = fold_generation(_joined([found.rows[name] for name in found.live if name in found.rows]))
    generation = max(broken, default=0)
    if not generation or generation < newest:
        return _joined([])
    older = _joined([found.rows[name] for name in found.rows if name in found.known and name not in found.live])
    older = older.filter(pc.less_equal(older["generation"], generation))
    needed = set(range(fold_generation(older) + 1, generation + 1))
    if needed <= set(older["generation"].to_pylist()) | found.empty_generations:
        for name in [name for name in found.live if name.startswith(f"fold-{generation:020}-")]:
            found.live.pop(name)
        return _joined([])
    if newest == generation:
        return _joined([])
    fold = make_table([Fold(None, None)], generation)
    return fold.set_column(1, SCHEMA.field("row"), pa.array([-1], pa.int32()))  # before the rows of the other parts


def _losses(found: _Found, restored: pa.Table) -> Iterator[str]:
    """Yield one sentence for each thing that is lost."""
    fold = restored.filter(pc.and_(is_of_fold(restored), pc.greater_equal(restored["row"], 0)))
    if fold.num_rows and not is_whole_fold(fold):
        yield f"adapters of generation {fold_generation(fold)} and older: data files of their fold may be missing"
    if found.is_log_lost:
        yield "any change that no whole data file has: the log that listed them is gone"
        return
    table = _joined([restored, *(found.rows[name] for name in found.live if name in found.rows)])
    have = {*range(fold_generation(table) + 1), *table["generation"].to_pylist()}
    for generation in range(1, found.log.newest + 1):
        name = commit_name(generation)
        if name in found.damaged and generation not in have:
            yield f"the change of generation {generation}: {name} {found.damaged[name]}, and no data file has its rows"
    for name, version in found.live.items():
        if name not in found.damaged:
            continue
        match = _FOLD_FILE.match(name)
        if match:
            yield f"adapters of generation {match[1]} and older: {name} {found.damaged[name]}"
        elif version in found.appended and version in have:
            continue
        elif version in found.appended:
            yield f"the change of generation {version}: {name} {found.damaged[name]}"
        else:
            yield f"changes up to generation {version}, unless another file has them: {name} {found.damaged[name]}"


def _table_lines(found: _Found) -> list[dict[str, Any]]:
    """Return the lines of a commit that describe the table: those of the log, or new ones if these are lost."""
    protocols = [protocol for _, protocol in found.log.all_actions("protocol")]
    tables = [table for _, table in found.log.all_actions("metaData")]
    if protocols and tables:
        return [{"protocol": _plain(protocols[-1])}, {"metaData": _plain(tables[-1])}]
    with TemporaryDirectory() as folder:
        create_table(Location(folder), _joined(list(found.rows.values())).schema)
        lines = [json.loads(line) for line in Path(folder, commit_name(0)).read_text().splitlines()]
    for line in lines:
        if "metaData" in line:
            line["metaData"]["createdTime"] = 0  # not younger than any blob
    return [line for line in lines if "commitInfo" not in line]


def _write_log(files: Files, version: int, commit: bytes) -> None:
    """Write a commit that is the whole table, and its checkpoint, with which a reader of the log begins.

    Raises: StoreDamaged if another process committed this version meanwhile.
    """
    with TemporaryDirectory() as folder, store_errors():
        Path(folder, LOG).mkdir()
        Path(folder, commit_name(0)).write_bytes(commit)
        DeltaTable(folder).create_checkpoint()
        checkpoint = Path(folder, checkpoint_name(0)).read_bytes()
        last = json.loads(Path(folder, LAST_CHECKPOINT).read_text())
    if files.contains(commit_name(version)):
        raise StoreDamaged(
            commit_name(version), "was written during the repair", "stop every server of this store first"
        )
    files.write(commit_name(version), commit)
    files.write(checkpoint_name(version), checkpoint)
    files.write(LAST_CHECKPOINT, json.dumps(last | {"version": version}).encode())


def _find_schema(found: _Found, data: bytes) -> pa.Schema:
    """Return the schema of the table; that of the data file if the log does not say it."""
    tables = [table for _, table in found.log.all_actions("metaData")]
    if not tables:
        return pq.read_schema(pa.BufferReader(data))
    return pa.schema(DeltaSchema.from_json(tables[-1]["schemaString"]).to_arrow())


def _find_format(found: _Found) -> TableFormat:
    for _, table in reversed(list(found.log.all_actions("metaData"))):
        for column in DeltaSchema.from_json(table["schemaString"]).fields:
            if column.name == COLUMN:
                return TableFormat.in_metadata(column.metadata)
    return OURS


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Return the rows of all tables, with the columns of SCHEMA and any others."""
    return pa.concat_tables([SCHEMA.empty_table(), *tables], promote_options="default")


def _rows_once(rows: pa.Table) -> pa.Table:
    """Return each row of a fold once: files that replaced one another have the same rows.

    Only a commit that the fold remembers has an id. In folds of an earlier release it has the number of another row.
    """
    keys = [commit or row for row, commit in zip(rows["row"].to_pylist(), rows["commit_id"].to_pylist(), strict=True)]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    return rows.take(pa.array(sorted(first.values()), pa.int64()))


def _plain(value: Any) -> Any:
    """Return an action without the empty fields that a checkpoint has."""
    return {key: item for key, item in value.items() if item is not None}
