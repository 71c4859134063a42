"""A long measurement in steps. Each step writes one small file; a run computes the missing ones."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console


@dataclass(frozen=True, slots=True)
class Step:
    """A measurement whose result is saved in `path`. `cost`: its duration in a unit shared by all steps."""

    name: str
    path: Path
    cost: float
    run: Callable[[], pa.Table]


def key_of(*parts: object) -> str:
    """Return a name for the result of these inputs, from their `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def run_steps(steps: Sequence[Step], seconds_per_cost: float, out: Console) -> None:
    """Compute the steps without a file. Print an estimate of the time first, and the rest after each step."""
    missing = [step for step in steps if not step.path.exists()]
    left = sum(step.cost for step in missing)
    estimate = f", about {_minutes(left * seconds_per_cost)} at the speed of this moment" if missing else ""
    out.print(f"{len(steps)} steps, {len(steps) - len(missing)} of them done before{estimate}", markup=False)
    spent_s, spent_cost = 0.0, 0.0
    for number, step in enumerate(missing, start=1):
        started = time.monotonic()
        write_parquet(step.path, step.run())
        took_s = time.monotonic() - started
        spent_s, spent_cost, left = spent_s + took_s, spent_cost + step.cost, left - step.cost
        rest = _minutes(left * spent_s / spent_cost)
        out.print(f"{number}/{len(missing)} {step.name}: {took_s:.0f} s; about {rest} left", markup=False)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    pq.write_table(table, scratch, compression="zstd")
    os.replace(scratch, path)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
