"""The Triton kernels by themselves: checked and timed in Triton's interpreter, and a wrong result is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.speed import SMALL

pytest.importorskip("triton", reason="Triton comes with vLLM or with torch for CUDA")
from benchmarks.gpu import kernels


def test_the_kernels_are_checked_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu.engine_run", "--engine", "triton", "--what", "kernels"]
    subprocess.run([*command, "--device", "cpu", "--out", str(out)], check=True, timeout=300)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["passed"] for row in rows if row["what"] == "check"] == [True, True]
    timed = [row for row in rows if "tiles_us" in row]
    assert len(timed) == len(SMALL.batches) * len(SMALL.active)
    assert all(row[name] > 0 for row in timed for name in ("tiles_us", "dense_us", "linears_us", "floor_us"))


def test_missing_or_nan_products_are_far_from_the_loop() -> None:
    bank = kernels.Bank.of({"q_proj": (3, 8)}, [2, 1], torch.device("cpu"), torch.float32)
    asked, counts = kernels._drawn(bank.pool, 4, 0), [1, 2, 1, 1]
    xs, ys = bank.inputs(5), bank.outputs(5)
    assert kernels._furthest(bank, xs, ys, asked, counts) == 1.0
    ys["q_proj"][2] = float("nan")
    assert kernels._furthest(bank, xs, ys, asked, counts) == float("inf")
