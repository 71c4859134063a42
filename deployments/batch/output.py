"""The output folder of an offline run: parts, complete or absent, and the manifest that all parts share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.errors import BatchRefused
from deployments.json_types import JsonObject
from lora_store import Location
from lora_store.files import Files

_MANIFEST = "_manifest.json"  # readers of parquet folders skip names that start with _ or .
_PART = re.compile(r"part-(\d{6,})\.parquet")


class Manifest(BaseModel):
    """The settings that all parts share. `generation`: the pool's when the run began. `run`: an id of its own.

    `began_at` is the time of all its usage events.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    generation: int
    input: JsonObject
    settings: JsonObject
    run: str = Field(default_factory=lambda: uuid4().hex)
    began_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class BatchOutput:
    """The parts and the manifest of a run. Raises: StoreUnavailable."""

    def __init__(self, uri: str) -> None:
        self._uri, self._files = uri, Files(Location(uri))

    def begin(self, wanted: Manifest) -> Manifest:
        """Return the manifest of the run: `wanted`, or for a resumed run the existing one, with its generation.

        Raises: BatchRefused: the folder contains other files, or the run would give other answers.
        """
        known = self._files.read(_MANIFEST)
        if known is None:
            if self._files.entries():
                raise BatchRefused(f"{self._uri} is not empty and contains no resumable run")
            self._files.write(_MANIFEST, wanted.model_dump_json(indent=1).encode())
            return wanted
        try:
            manifest = Manifest.model_validate_json(known)
        except ValidationError as exc:
            raise BatchRefused(f"{self._uri}/{_MANIFEST} is not a manifest of this version") from exc
        if manifest.input != wanted.input:
            raise BatchRefused(
                f"the input differs from that of the run in {self._uri}: {_differing(manifest.input, wanted.input)}"
            )
        recorded = wanted.settings | manifest.settings  # a manifest of an earlier version may lack a setting
        if recorded != wanted.settings:
            raise BatchRefused(f"{self._uri} was started with other settings: {_differing(recorded, wanted.settings)}")
        self._files.delete([file.name for file in self._files.entries() if file.name.startswith(".part-")])
        if "began_at" not in manifest.model_fields_set:  # of an earlier version
            self._files.write(_MANIFEST, manifest.model_dump_json(indent=1).encode())
        return manifest

    def done(self) -> set[int]:
        """Return the numbers of the existing parts."""
        matches = (_PART.fullmatch(file.name) for file in self._files.entries())
        return {int(match[1]) for match in matches if match is not None}

    def write(self, number: int, part: pa.Table) -> None:
        """Write the part atomically."""
        sink = pa.BufferOutputStream()
        pq.write_table(part, sink)
        self._files.write(f"part-{number:06}.parquet", sink.getvalue())


def _differing(before: JsonObject, now: JsonObject) -> str:
    old, new = dict(_flat(before)), dict(_flat(now))
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names)


def _flat(tree: JsonObject, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
