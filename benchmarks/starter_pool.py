"""The starter pool of `examples/`: its adapter folders and its held-out prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_EXAMPLES = Path(__file__).parents[1] / "examples"
POOL = _EXAMPLES / "starter_pool"
HELD_OUT = _EXAMPLES / "starter_heldout"
NUM_TRAINED = 20  # of an adapter's samples: the first ones are training inputs. Those in other words follow them.


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """One held-out prompt of one task, with its expected answer."""

    task: str
    input: str
    output: str


def read_prompts(folder: Path, per_task: int) -> list[HeldOutPrompt]:
    """Return the first `per_task` prompts of every task, in turns, so that neighbours are of different tasks."""
    by_task = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:per_task]]
        by_task.append([HeldOutPrompt(path.stem, row["input"], row["output"]) for row in rows])
    return [prompt for turn in zip(*by_task, strict=True) for prompt in turn]
