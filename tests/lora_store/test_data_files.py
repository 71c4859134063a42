from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_store import Location
from lora_store.data_files import DATA_SUFFIX, all_columns_in, make_commit, rows_in, write_rows
from lora_store.events import SCHEMA
from lora_store.files import Files

ROWS = [{"generation": 3, "row": 0, "event": "withdraw", "tenant": "local", "name": "poet", "tags": ["a"]}]
NEWER = pa.schema([*SCHEMA, pa.field("license", pa.string())])


def _parquet(rows: list[dict[str, object]], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def test_rows_are_read_as_they_were_written(location: Location) -> None:
    files, rows = Files(location), pa.Table.from_pylist(ROWS, schema=SCHEMA)
    action = write_rows(files, rows, "part", is_change=True)
    data = files.read(action.path)
    assert data is not None and action.path.endswith(DATA_SUFFIX) and action.size == len(data)
    assert rows_in(data) == (rows, False)


def test_a_flipped_bit_is_found(location: Location) -> None:
    files = Files(location)
    rows = pa.Table.from_pylist([ROWS[0] | {"name": "n" * 5000}], schema=SCHEMA)
    data = files.read(write_rows(files, rows, "part", is_change=True).path) or b""
    num_found = 0
    name = data.index(b"generation")  # in the footer
    for place in [*range(4, len(data) // 2, 97), *range(name, name + 10)]:
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            read = rows_in(changed)[0]
        except (OSError, pa.ArrowException):
            num_found += 1
        else:
            assert read == rows  # the byte has no meaning
    assert num_found > 15


@pytest.mark.parametrize(
    ("row", "has_unknown"),
    [({}, False), ({"license": None}, False), ({"license": "MIT"}, True), ({"event": "pin"}, True)],
)
def test_a_value_or_an_event_that_only_a_newer_release_knows_is_noticed(
    row: dict[str, object], has_unknown: bool
) -> None:
    rows, found = rows_in(_parquet([ROWS[0] | row], NEWER))
    assert (rows.schema, found) == (SCHEMA, has_unknown)


def test_rows_of_older_and_newer_releases_are_joined_with_every_column() -> None:
    old = _parquet(ROWS, pa.schema([field for field in SCHEMA if field.name != "trial"]))
    new = _parquet([ROWS[0] | {"license": "MIT"}], NEWER)
    joined = all_columns_in([old, new], NEWER)
    assert joined["license"].to_pylist() == [None, "MIT"]
    assert joined["trial"].to_pylist() == [None, None]
    assert joined.schema.names == NEWER.names


def test_a_commit_lists_what_joins_and_what_leaves_the_table(location: Location) -> None:
    added = write_rows(Files(location), SCHEMA.empty_table(), "part", is_change=True)
    lines = [json.loads(line) for line in make_commit([added], ["old"], [{"protocol": {}}]).splitlines()]
    assert [next(iter(line)) for line in lines] == ["commitInfo", "protocol", "add", "remove"]
    assert lines[2]["add"]["path"] == added.path and lines[2]["add"]["dataChange"]
    assert lines[3]["remove"]["path"] == "old" and not lines[3]["remove"]["dataChange"]
