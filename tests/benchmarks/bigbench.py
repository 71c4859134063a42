"""A made-up source distribution with the structure of BIG-bench's, and a tokenizer with one token per word."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def word_tokenizer(text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]:
    return {"input_ids": [[0] * len(one.split()) for one in text]}


def write_archive(path: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the archive. `tasks`: the path of a task inside the distribution, and its examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, examples in tasks.items():
            data = json.dumps({"examples": examples}).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
