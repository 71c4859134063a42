"""Ordinary prompts: what people ask an assistant, to compare with what a pool's adapters are for.

They are in `data/ordinary_prompts.jsonl`, one a line. This project wrote them; they come from no data set.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files


def ordinary_prompts() -> list[str]:
    """Return the packaged prompts."""
    return [json.loads(line)["input"] for line in _file().decode().splitlines()]


def prompts_digest() -> str:
    """Return the sha256 of the packaged prompts."""
    return hashlib.sha256(_file()).hexdigest()


def _file() -> bytes:
    return files("retriever_svc").joinpath("data/ordinary_prompts.jsonl").read_bytes()
