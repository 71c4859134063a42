"""A folder of a cache that is there as a whole or not at all, also after a power failure."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_store.files import flush_to_disk


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the block ends without an error.

    Only one process at a time may build a folder: what earlier ones left when they were killed is removed.
    """
    prefix = f".{folder.name}-"
    for path in folder.parent.iterdir():
        if re.fullmatch(re.escape(prefix) + "[a-z0-9_]{8}", path.name):  # as tempfile names them
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        target = Path(scratch, "built")
        target.mkdir()
        yield target
        for path in (*target.rglob("*"), target):
            flush_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
        flush_to_disk(folder.parent)
