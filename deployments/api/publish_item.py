"""An adapter to publish: a folder of the server, uploaded files, or a source URI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_store import LOCAL_TENANT, Visibility

FileBytes = bytes | NDArray[np.uint8]  # an array travels by Ray's object store, and is not copied where it arrives


MAX_UPLOAD_FILES = 64


@dataclass(frozen=True, slots=True)
class PublishItem:
    """A PEFT folder to publish, and what its publisher says of it. Exactly one of `path`, `files` and `source`."""

    path: Path | None = None
    name: str | None = None  # default: the last part of path or source
    tenant: str = LOCAL_TENANT
    tags: tuple[str, ...] = ()
    template: str | None = None
    files: Mapping[str, FileBytes] | None = None
    source: str | None = None
    visibility: Visibility | None = None  # None: as its name has it, or for a new name `default_visibility`
    default_visibility: Visibility = "public"

    def __post_init__(self) -> None:
        given = [what for what in (self.path, self.files, self.source) if what is not None]
        if len(given) != 1:
            raise ValueError(f"an upload is one of path, files and source, got {len(given)} of them")

    @property
    def adapter_name(self) -> str:
        """The name it is published under; "" for files without one, which admission refuses."""
        if self.name is not None:
            return self.name
        return (self.source or "").rstrip("/").rpartition("/")[2] if self.path is None else self.path.name

    @property
    def origin(self) -> str:
        """Where it came from, as the catalogue keeps it."""
        return self.source if self.source is not None else self.adapter_name
