"""The data files of the catalogue's table: rows as Parquet with checksums."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.transaction import AddAction

from lora_store.events import SCHEMA, knows_all_events
from lora_store.files import Files, open_for_arrow

DATA_SUFFIX = ".zstd.parquet"


def write_rows(files: Files, rows: pa.Table, prefix: str, *, is_change: bool) -> AddAction:
    """Write a data file below `files`. Return the action that makes it part of a table. Raises: StoreUnavailable.

    `is_change`: the rows are new; otherwise they replace others.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows, sink, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    data = sink.getvalue()
    name = f"{prefix}-{uuid4()}{DATA_SUFFIX}"
    files.write(name, data)
    return AddAction(name, data.size, {}, int(time.time() * 1000), is_change, "{}")


def rows_in(content: bytes) -> tuple[pa.Table, bool]:
    """Return the rows of a data file with the columns of SCHEMA, and whether a newer release's values are among them.

    Columns that an earlier release did not write are null. Raises: ArrowException, OSError for a damaged file.
    """
    rows = pq.read_table(open_for_arrow(content), schema=SCHEMA, page_checksum_verification=True)
    names = [name for name in _column_names(content) if name not in SCHEMA.names]
    unknown = pq.read_table(open_for_arrow(content), columns=names).columns if names else []
    has_unknown = any(column.null_count < len(column) for column in unknown)
    return rows, has_unknown or not knows_all_events(rows)


def _column_names(content: bytes) -> list[str]:
    """Return the names of a data file's columns. Raises: ArrowInvalid for a damaged one, which would read as a null.

    The footer has no checksum, but it has the names twice.
    """
    footer = pq.read_metadata(pa.BufferReader(content))
    names: list[str] = footer.schema.to_arrow_schema().names
    again = (footer.metadata or {}).get(b"ARROW:schema")
    try:
        is_whole = again is None or names == pa.ipc.read_schema(pa.BufferReader(base64.b64decode(again))).names
    except ValueError:
        is_whole = False
    if not is_whole:
        raise pa.ArrowInvalid("the names of the columns are damaged")
    return names


def all_columns_in(contents: Iterable[bytes], schema: pa.Schema) -> pa.Table:
    """Return the rows of data files with the columns of SCHEMA, then those that only `schema` has.

    Raises: ArrowException, OSError for a damaged file.
    """
    unknown = [field for field in schema if field.name not in SCHEMA.names]
    full = pa.schema([*SCHEMA, *unknown])
    read = partial(pq.read_table, schema=full, page_checksum_verification=True)
    return pa.concat_tables([full.empty_table(), *(read(open_for_arrow(content)) for content in contents)])


def make_commit(added: Sequence[AddAction], removed: Collection[str] = (), others: Sequence[object] = ()) -> bytes:
    """Return a commit of the Delta log: data files that become part of the table, those that no longer are, others."""
    now_ms = int(time.time() * 1000)
    lines: list[object] = [{"commitInfo": {"timestamp": now_ms, "operation": "WRITE"}}, *others]
    for action in added:
        values = {"path": action.path, "partitionValues": {}, "size": action.size}
        lines.append({"add": values | {"modificationTime": action.modification_time, "dataChange": action.data_change}})
    lines += [{"remove": {"path": name, "deletionTimestamp": now_ms, "dataChange": False}} for name in removed]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
