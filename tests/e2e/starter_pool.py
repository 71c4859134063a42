"""The starter pool and its held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
POOL = EXAMPLES / "starter_pool"


@dataclass(frozen=True, slots=True)
class Heldout:
    """One held-out prompt of a starter task."""

    task: str
    input: str
    output: str
