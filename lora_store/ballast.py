"""A reserve on the disk of a folder, for the changes that free space on a full disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from lora_store.errors import StoreFull
from lora_store.files import Files
from lora_store.location import Location

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
FOLDER = "ballast"
NUM_FILES = 16  # one or two are spent on a withdrawal, one on a garbage collection
_FILE_BYTES = 64 << 10


class Ballast:
    """Files without a meaning in a store that is a folder. Deleting one makes room for a small change."""

    def __init__(self, store: Location) -> None:
        self._is_local, self._files = store.is_local, Files(store.child(FOLDER))

    def fill(self) -> None:
        """Write the files that are missing, as far as the disk has room. Do nothing in a bucket."""
        if not self._is_local:
            return
        found = {file.name for file in self._files.entries()}
        try:
            for name in [name for name in _NAMES if name not in found]:
                self._files.write(name, os.urandom(_FILE_BYTES), durable=False)  # no file system can compress it
        except StoreFull:
            logger.warning("the store's disk is full: it has no room for the reserve of a later withdrawal")

    def spend(self, change: Callable[[], Result]) -> Result:
        """Return what `change` returns. Each time it finds the disk full, delete a file and call it again.

        Raises: StoreFull once no file is left.
        """
        while True:
            try:
                return change()
            except StoreFull as exc:
                left = sorted(file.name for file in self._files.entries()) if self._is_local else []
                if not left:
                    raise
                self._files.delete(left[:1])
                logger.warning(
                    "the store's disk is full: %d files of its reserve are left: %s", len(left) - 1, exc.cause
                )


_NAMES = [f"{number:02}" for number in range(NUM_FILES)]
