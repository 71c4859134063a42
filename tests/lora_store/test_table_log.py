from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from lora_store import Location, StoreUnavailable
from lora_store.errors import StoreDamaged
from lora_store.event_table import EventTable, create_table
from lora_store.events import SCHEMA
from lora_store.files import Files
from lora_store.table_log import LAST_CHECKPOINT, LOG, check_sizes, checkpoint_name, commit_name, read_log


@pytest.fixture
def files(location: Location) -> Files:
    """Return the files of a table of four versions."""
    create_table(location)
    table = EventTable(location)
    for version in (1, 2, 3):
        row = {"generation": version, "row": 0, "event": "withdraw"}
        assert table.append(pa.Table.from_pylist([row], schema=SCHEMA), version)
    return Files(location)


def _added(files: Files) -> list[int]:
    """Return the versions whose data files the log names."""
    return [version for version, _ in read_log(files).all_actions("add")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:-5], "is cut or overwritten in line 2"),
        (lambda data: bytes(len(data)), "is cut or overwritten in line 1"),
        (None, "is missing"),
    ],
)
def test_a_broken_commit_is_named(files: Files, change: Callable[[bytes], bytes] | None, problem: str) -> None:
    log = read_log(files)
    assert (log.damaged, log.newest, _added(files)) == ({}, 3, [1, 2, 3])
    if change is None:
        files.delete([commit_name(2)])
    else:
        files.write(commit_name(2), change(files.read(commit_name(2)) or b""))
    assert read_log(files).damaged == {commit_name(2): problem}
    assert _added(files) == [1, 3]


def test_the_log_begins_with_the_newest_whole_checkpoint(files: Files, location: Location) -> None:
    EventTable(location).compact()  # version 4, and its checkpoint
    files.delete([commit_name(version) for version in range(3)])
    assert read_log(files).damaged == {}
    files.write(checkpoint_name(4), b"PAR1")
    assert set(read_log(files).damaged) == {checkpoint_name(4), *map(commit_name, range(3))}


def test_without_a_log_the_log_is_missing(location: Location) -> None:
    assert read_log(Files(location)).damaged == {LOG: "is missing"}


def test_a_log_that_a_rival_changes_while_it_is_read_is_not_damaged(
    files: Files, location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ChangedFiles(Files):
        """Get a checkpoint after the log was listed."""

        def read(self, name: str) -> bytes | None:
            if name == LAST_CHECKPOINT and not self.contains(checkpoint_name(3)):
                DeltaTable(location.delta_uri, storage_options=location.storage_options).create_checkpoint()
            return super().read(name)

    def time_out(table: DeltaTable) -> None:
        raise DeltaError("a timeout")

    monkeypatch.setattr("lora_store.event_table.Files", ChangedFiles)
    monkeypatch.setattr(DeltaTable, "update_incremental", time_out)
    with pytest.raises(StoreUnavailable, match="a timeout"):
        EventTable(location).update()
    assert files.contains(checkpoint_name(3))


def test_an_empty_commit_counts_until_a_checkpoint_replaces_it(files: Files) -> None:
    check_sizes(files, "/pool")
    files.write(commit_name(2), b"")
    with pytest.raises(StoreDamaged, match=f"/pool/{commit_name(2)} is empty"):
        check_sizes(files, "/pool")
    files.write(checkpoint_name(2), b"whole")
    check_sizes(files, "/pool")
