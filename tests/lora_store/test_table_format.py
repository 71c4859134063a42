"""Pools of every release, and of one to come: opened, published to, folded and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake import Field as DeltaField

from lora_store import Location, LoraStore
from lora_store.catalogue import Catalogue
from lora_store.errors import StoreIsNewer
from lora_store.event_table import EventTable
from lora_store.events import SCHEMA, Publish
from lora_store.files import Files
from lora_store.repair import repair
from lora_store.table_format import COLUMN, KEY, OURS, TableFormat
from tests.lora_store.builders import BASE, IN_A_FOLDER, NOON, MakeFolder, MakeRecord, embedding
from tests.lora_store.pools.make import facts_of
from tests.lora_store.publishing import publish

POOLS = sorted(path for path in Path(__file__).with_name("pools").iterdir() if path.is_dir() and path.name[0].isdigit())
NEWER = TableFormat(number=OURS.number + 1, reader=OURS.number, writer=OURS.number, release="9.8.7")
Copy = Callable[[Path], LoraStore]


@pytest.fixture
def copy(location: Location) -> Copy:
    """Return a function that copies a stored pool to the location of the test and opens it."""

    def copy_pool(pool: Path) -> LoraStore:
        files = Files(location)
        for path in pool.rglob("*"):
            if path.is_file() and path.name != "expected.json":
                files.write(str(path.relative_to(pool)), path.read_bytes())
        return LoraStore(location.uri, accepts_base=[BASE])

    return copy_pool


@pytest.fixture
def table(location: Location) -> Location:
    return location.child("catalogue")


def _delta(table: Location) -> DeltaTable:
    return DeltaTable(table.delta_uri, storage_options=table.storage_options)


def _expected(pool: Path) -> dict[str, Any]:
    expected: dict[str, Any] = json.loads((pool / "expected.json").read_text())
    return expected


def test_there_is_a_pool_of_every_format() -> None:
    assert [pool.name for pool in POOLS] == ["0.1.0", "0.2.0"]
    assert len(POOLS) == OURS.number and POOLS[-1].name == OURS.release


@IN_A_FOLDER
@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.name)
def test_a_pool_of_a_release_is_read_as_it_was_written(copy: Copy, pool: Path) -> None:
    store = copy(pool)
    assert facts_of(store) == _expected(pool)
    checks = list(store.verify())
    assert len(checks) >= 10 and {check.problem for check in checks} == {None}


@pytest.mark.parametrize(
    ("store_uri", "pool"), [*(("folder", pool) for pool in POOLS), ("s3", POOLS[0])], indirect=["store_uri"]
)
def test_a_pool_of_a_release_is_published_to_folded_and_read_back(
    copy: Copy, location: Location, table: Location, pool: Path, make_folder: MakeFolder
) -> None:
    store = copy(pool)
    publish(store, make_folder("fresh", 7), "fresh")
    store.withdraw("local", ["coder"], "me")
    store.gc(0)  # folds
    (data_file,) = EventTable(table)._data_files()
    assert data_file.startswith("fold-")
    found = facts_of(LoraStore(location.uri, accepts_base=[BASE]))
    adapters = _expected(pool)["adapters"]
    del adapters["local/coder"]
    assert found["adapters"].pop("local/fresh")[0]["tags"] == []
    assert found == {"encoder": _expected(pool)["encoder"], "adapters": adapters}
    assert {field.name for field in _delta(table).schema().fields} == set(SCHEMA.names)
    assert EventTable(table).format == OURS
    assert {check.problem for check in store.verify()} == {None}


def _write_as_newer(table: Location, form: TableFormat = NEWER, *, has_values: bool = True) -> None:
    """Add a column, and if wanted a publish with a value in it and an event of a new kind."""
    delta = _delta(table)
    delta.alter.add_columns([DeltaField("license", "string")])
    delta.alter.set_column_metadata(COLUMN, {KEY: form.to_json()})
    if not has_values:
        return
    row = next(row for row in EventTable(table).refresh()[0].to_pylist() if row["event"] == "publish")
    version = _delta(table).version() + 1
    theirs = {"tenant": "local", "name": "licensed", "generation": version}
    added = {"digest": "c" * 64, "visibility": "private", "license": "MIT", "trial": None, "commit_id": "theirs"}
    rows = [row | theirs | added | {"row": 0}, theirs | {"row": 1, "event": "pin", "license": "BSD"}]
    here = {field.name for field in _delta(table).schema().fields}
    schema = pa.schema([*(field for field in SCHEMA if field.name in here), pa.field("license", pa.string())])
    options = table.storage_options
    rows = pa.Table.from_pylist(rows, schema=schema)
    write_deltalake(table.delta_uri, rows, mode="append", storage_options=options)


def _licenses(table: Location) -> list[str]:
    """Return what a newer release would read in its column."""
    rows = _delta(table).to_pyarrow_table(columns=["event", "license"])
    return sorted(f"{row['event']} {row['license']}" for row in rows.to_pylist() if row["license"])


def test_a_newer_pool_is_read_and_written_and_keeps_what_is_unknown(
    copy: Copy, location: Location, table: Location, make_folder: MakeFolder, make_record: MakeRecord
) -> None:
    before = facts_of(copy(POOLS[-1]))
    _write_as_newer(table)
    store = LoraStore(location.uri, accepts_base=[BASE])
    found = facts_of(store)["adapters"]
    assert found.pop("local/licensed")
    assert found == before["adapters"]
    publish(store, make_folder("fresh", 7), "fresh")
    catalogue = Catalogue(table, min_tail=1)  # would fold at each commit
    for number in range(3):
        catalogue.commit(lambda _, number=number: [Publish(make_record(f"a{number}"))])
    EventTable(table).compact()
    gone = store.withdraw("local", ["fresh"], "me")
    assert store.sweep([digest for record in gone.records for digest in record.blobs]) == []
    with pytest.raises(StoreIsNewer, match=r"cannot delete unused files .* Use release 9\.8\.7 or later"):
        store.gc(0)
    assert _licenses(table) == ["pin BSD", "publish MIT"]
    assert ("local", "licensed") in Catalogue(table).snapshot().records
    assert EventTable(table).format == NEWER


@IN_A_FOLDER
def test_a_pool_with_an_empty_newer_column_is_folded(copy: Copy, location: Location, table: Location) -> None:
    store = copy(POOLS[-1])
    before = facts_of(store)
    _write_as_newer(table, has_values=False)
    store.gc(0)
    assert facts_of(LoraStore(location.uri, accepts_base=[BASE])) == before
    assert "license" in {field.name for field in _delta(table).schema().fields}


@IN_A_FOLDER
def test_a_pool_that_this_release_would_damage_is_only_read(
    copy: Copy, location: Location, table: Location, make_folder: MakeFolder
) -> None:
    store = copy(POOLS[-1])
    before = facts_of(store)
    _write_as_newer(table, TableFormat(9, reader=OURS.number, writer=9, release="9.8.7"), has_values=False)
    reopened = LoraStore(location.uri, accepts_base=[BASE])
    assert facts_of(reopened) == before
    staged = reopened.stage(make_folder("fresh", 7))
    for refused in (
        lambda: reopened.commit([staged], [embedding()], [1.0], "me"),
        lambda: reopened.withdraw("local", ["poet"], "me"),
        lambda: reopened.gc(0),
    ):
        with pytest.raises(StoreIsNewer, match=r"Use release 9\.8\.7 or later"):
            refused()
    Files(table).write(f"_delta_log/{_delta(table).version() + 1:020}.json", b"")
    with pytest.raises(StoreIsNewer, match=r"Use release 9\.8\.7 or later"):
        repair(location, NOON)


@IN_A_FOLDER
def test_a_pool_that_this_release_would_misread_is_not_opened(copy: Copy, location: Location, table: Location) -> None:
    running = copy(POOLS[-1])
    _write_as_newer(table, TableFormat(9, reader=9, writer=9, release="9.8.7"), has_values=False)
    with pytest.raises(StoreIsNewer, match=r"cannot read the adapter store.*9\.8\.7"):
        LoraStore(location.uri, accepts_base=[BASE])
    with pytest.raises(StoreIsNewer, match="cannot read"):
        running.snapshot()


@IN_A_FOLDER
def test_a_repair_keeps_what_a_newer_release_wrote(copy: Copy, location: Location, table: Location) -> None:
    copy(POOLS[-1])
    _write_as_newer(table)
    Files(table).write(f"_delta_log/{_delta(table).version():020}.json", b"")
    done = repair(location, NOON)
    assert done is not None and done.lost == ()
    assert _licenses(table) == ["pin BSD", "publish MIT"]
    assert EventTable(table).format == NEWER
