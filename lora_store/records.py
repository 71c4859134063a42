"""What the catalogue knows of one adapter version, and how that is laid out in a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Literal, get_args

import pyarrow as pa

from lora_store.adapter import AdapterRef

Visibility = Literal["public", "private"]
VISIBILITIES: tuple[str, ...] = get_args(Visibility)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version of one adapter, as the catalogue holds it. `embedding` is None for what `auto` cannot find."""

    ref: AdapterRef
    weights_digest: str
    samples_digest: str | None
    visibility: Visibility
    tags: tuple[str, ...]
    base_model: str
    ranks: tuple[int, ...]  # distinct, sorted
    target_modules: tuple[str, ...]  # distinct last parts of the module paths, sorted
    num_bytes: int
    num_samples: int
    template: str | None
    embedding: tuple[float, ...] | None
    encoder: str | None
    probe_shift: float | None
    source: str
    actor: str
    created_at: datetime  # UTC
    generation: int

    def is_visible_to(self, tenant: str) -> bool:
        return self.visibility == "public" or self.ref.tenant == tenant


SCHEMA = pa.schema(
    [
        pa.field("generation", pa.int64(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # the order within one generation
        pa.field("event", pa.string(), nullable=False),
        pa.field("tenant", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("digest", pa.string()),
        pa.field("weights_digest", pa.string()),
        pa.field("samples_digest", pa.string()),
        pa.field("visibility", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("base_model", pa.string()),
        pa.field("ranks", pa.list_(pa.int32())),
        pa.field("target_modules", pa.list_(pa.string())),
        pa.field("num_bytes", pa.int64()),
        pa.field("num_samples", pa.int32()),
        pa.field("template", pa.string()),
        pa.field("embedding", pa.list_(pa.float32())),
        pa.field("encoder", pa.string()),
        pa.field("probe_shift", pa.float64()),
        pa.field("source", pa.string()),
        pa.field("actor", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC")),
    ]
)
_COLUMNS = tuple(field.name for field in fields(AdapterRecord) if field.name != "ref")


def row_of(event: str, record: AdapterRecord, row: int) -> dict[str, Any]:
    """The table's row for one event."""
    ref = record.ref
    identity = {"event": event, "row": row, "tenant": ref.tenant, "name": ref.name, "digest": ref.digest}
    return identity | {column: getattr(record, column) for column in _COLUMNS}


def record_from_row(row: Mapping[str, Any]) -> AdapterRecord:
    """The record `row_of` wrote; `embedding` comes back in float32's precision."""
    values: dict[str, Any] = {
        column: tuple(row[column]) if isinstance(row[column], list) else row[column] for column in _COLUMNS
    }
    return AdapterRecord(ref=AdapterRef(row["tenant"], row["name"], row["digest"]), **values)
