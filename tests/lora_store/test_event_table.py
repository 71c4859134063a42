from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake.transaction import AddAction

from lora_store import Location
from lora_store.data_files import write_rows
from lora_store.errors import StoreDamaged, StoreFull
from lora_store.event_table import EventTable, create_table
from lora_store.events import Publish, make_table
from lora_store.files import Files
from lora_store.table_log import LOG, commit_name
from tests.lora_store.builders import IN_A_FOLDER, LATER, MakeRecord


class RivalFirst(EventTable):
    """Calls the rival once, between reading the log and reading the data files."""

    rival = None

    def _data_files(self) -> set[str]:
        names = super()._data_files()
        if self.rival is not None:
            rival, self.rival = self.rival, None
            rival()
        return names


Rows = Callable[[str, int], pa.Table]


@pytest.fixture
def location(location: Location) -> Location:
    """Return the location of an empty table."""
    create_table(location)
    return location


@pytest.fixture
def rows(make_record: MakeRecord) -> Rows:
    return lambda name, generation: make_table([Publish(make_record(name))], generation)


def _refreshed(table: EventTable) -> pa.Table:
    """Return the new rows, after folding."""
    rows, files = table.refresh()
    table.read_files = files
    return rows


def _names(table: pa.Table) -> list[str]:
    return sorted(table["name"].to_pylist())


def _filled(location: Location, rows: Rows, number: int) -> EventTable:
    table = EventTable(location)
    _refreshed(table)
    for version in range(1, number + 1):
        assert table.append(rows(f"a{version}", version), version)
    return table


def test_each_file_is_returned_once(location: Location, rows: Rows) -> None:
    table = _filled(location, rows, 2)
    assert _names(_refreshed(table)) == ["a1", "a2"]
    assert _refreshed(table).num_rows == 0
    assert table.append(rows("a3", 3), 3)
    assert (_names(_refreshed(table)), table.version) == (["a3"], 3)


def test_an_append_at_a_taken_version_changes_nothing(location: Location, rows: Rows) -> None:
    table, rival = EventTable(location), EventTable(location)
    assert rival.append(rows("rival", 1), 1)
    assert not table.append(rows("ours", 1), 1)
    assert _names(_refreshed(table)) == ["rival"]
    assert not table.append(rows("ours", 1), 1)


def test_a_reader_whose_files_are_vacuumed_reads_the_compacted_ones(location: Location, rows: Rows) -> None:
    writer, late, new = _filled(location, rows, 3), RivalFirst(location), RivalFirst(location)
    _refreshed(late)
    assert writer.append(rows("a4", 4), 4)

    def vacuum() -> None:
        writer.vacuum(before=LATER)

    late.rival = vacuum
    found = _refreshed(late)
    assert "a4" in _names(found) and late.version == 5
    assert writer.append(rows("a5", 6), 6)
    new.rival = vacuum
    assert _names(_refreshed(new)) == ["a1", "a2", "a3", "a4", "a5"]


@IN_A_FOLDER
def test_a_fold_that_finds_the_disk_full_leaves_no_part_of_it(
    location: Location, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _filled(location, rows, 3)
    before = set(Files(location).entries())
    parts = [rows(f"a{number}", 3) for number in range(1, 4)]

    def write_unless_full(files: Files, part: pa.Table, *args: Any, **options: Any) -> AddAction:
        if part is parts[-1]:
            raise StoreFull("No space left on device")
        return write_rows(files, part, *args, **options)

    monkeypatch.setattr("lora_store.event_table.write_rows", write_unless_full)
    with pytest.raises(StoreFull):
        table.fold(parts, 3, table.read_files)
    assert set(Files(location).entries()) == before


def test_vacuum_leaves_one_data_file_and_every_row(location: Location, rows: Rows) -> None:
    table, files = _filled(location, rows, 5), Files(location)
    files.write("part-of-a-rival.parquet", b"rows")
    files.write("part-killed#1", b"half")
    files.write("_delta_log/_tmp", b"half")
    table.vacuum(before=datetime.now(UTC) - timedelta(hours=1))
    assert files.contains("part-of-a-rival.parquet"), "which may not have committed yet"
    for _ in range(2):
        table.vacuum(before=LATER)
        names = {file.name for file in files.entries()}
        assert len([name for name in names if not name.startswith("_delta_log/")]) == 1
        assert "_delta_log/_tmp" not in names
        assert {"_delta_log/_last_checkpoint", f"_delta_log/{6:020}.json"} <= names
        assert _names(_refreshed(EventTable(location))) == [f"a{number}" for number in range(1, 6)]


@IN_A_FOLDER
def test_a_reader_catches_up_over_commits_that_were_deleted_meanwhile(location: Location, rows: Rows) -> None:
    late, table = EventTable(location), _filled(location, rows, 3)
    for _ in range(2):  # what is older than a checkpoint is deleted once the checkpoint is a day old
        assert table.append(rows("more", table.version + 1), table.version + 1)
        for file in Path(location.uri, LOG).iterdir():
            os.utime(file, (0, 0))
        table.compact()
    assert not Files(location).contains(commit_name(2))
    assert _names(_refreshed(late)) == ["a1", "a2", "a3", "more", "more"]
    assert late.append(rows("late", late.version + 1), late.version + 1)


@IN_A_FOLDER
def test_a_commit_that_is_missing_without_a_checkpoint_is_reported(location: Location, rows: Rows) -> None:
    class LosesACommit(EventTable):
        def _require_log(self) -> None:
            """Delete the commit that was just read."""
            Files(location).delete([commit_name(2)])

    late = LosesACommit(location)
    _filled(location, rows, 2)
    with pytest.raises(StoreDamaged, match=f"{commit_name(2)} is missing"):
        late.update()
