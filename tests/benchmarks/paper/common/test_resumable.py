from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from benchmarks.paper.common.resumable import Step, key_of, run_steps


class Machine:
    """Steps that record when they run; those named in `failing` raise."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran, self.failing = folder, [], set()
        self.out = Console(record=True, width=200)

    def step(self, name: str, cost: float) -> Step:
        def run() -> pa.Table:
            if name in self.failing:
                raise RuntimeError(name)
            self.ran.append(name)
            return pa.table({"name": [name]})

        return Step(name, self.folder / "rows" / f"{name}.parquet", cost, run)


def test_an_interrupted_run_continues_where_it_stopped(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    steps = [machine.step("a", 1), machine.step("b", 2), machine.step("c", 3)]
    machine.failing = {"b"}
    with pytest.raises(RuntimeError):
        run_steps(steps, 1.0, machine.out)
    machine.failing = set()
    run_steps(steps, 1.0, machine.out)
    assert machine.ran == ["a", "b", "c"]
    assert [pq.read_table(step.path)["name"].to_pylist() for step in steps] == [["a"], ["b"], ["c"]]
    assert {path.suffix for path in (tmp_path / "rows").iterdir()} == {".parquet"}


def test_the_estimate_is_printed_first_and_counts_the_remaining_steps(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    run_steps([machine.step("a", 1)], 60.0, machine.out)
    run_steps([machine.step("a", 1), machine.step("b", 5), machine.step("c", 5)], 60.0, machine.out)
    lines = machine.out.export_text().splitlines()
    assert lines[2].startswith("3 steps, 1 of them done before, about 10 min")
    assert lines[3].startswith("1/2 b: 0 s; about 0 s left")


def test_a_key_distinguishes_different_inputs() -> None:
    assert key_of(["a", "b"], 3) == key_of(["a", "b"], 3)
    assert len({key_of(), key_of("a"), key_of("b"), key_of("a", 1), key_of("a", 2), key_of(["a"], 1)}) == 6
