"""`make gpu` at toy size on the CPU: every installed engine is checked and measured, and a failure is seen."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from benchmarks.gpu.__main__ import app, figures_of, run_one
from benchmarks.gpu.checks import Check, run_checks
from benchmarks.gpu.engine_run import settings_of, weight_bytes
from benchmarks.gpu.hosting import Hosted
from benchmarks.gpu.models import TOY, save_random
from benchmarks.gpu.speed import SMALL, Cell, Floor, cells
from lora_store import ModuleWeights
from tests.soak import Scale

NUM_CHECKS = {"native": 6, "vllm": 6, "triton": 2}
ENGINES = ["native", *(["vllm"] if importlib.util.find_spec("vllm") else [])]

TRITON = ["triton"] if importlib.util.find_spec("triton") else []


def test_every_engine_is_checked_and_measured(tmp_path: Path, scale: Scale) -> None:
    if not scale.is_full:
        pytest.skip("the whole measurement takes a minute: in make soak")
    out = tmp_path / "gpu.json"
    run = CliRunner().invoke(app, ["--toy", "--minutes", "8", "--out", str(out)])
    assert run.exit_code == 0, run.output
    found = json.loads(out.read_text())
    assert {row["engine"] for row in found["rows"]} == {*ENGINES, *TRITON}
    for engine in [*ENGINES, *TRITON]:
        rows = [row for row in found["rows"] if row["engine"] == engine]
        assert [row["passed"] for row in rows if row["what"] == "check"] == [True] * NUM_CHECKS[engine]
    for engine in ENGINES:
        rows = [row for row in found["rows"] if row["engine"] == engine]
        measured = [row for row in rows if "decode_tokens_per_s" in row]
        assert len(measured) == len(list(cells(SMALL)))
        assert all(math.isfinite(row["tokens_per_s"]) and row["tokens_per_s"] > 0 for row in measured)
        assert found["figures"][f"gpu_{engine}_first_token_hot_s"] > 0


def test_an_engine_that_applies_other_weights_fails_the_checks(tmp_path: Path) -> None:
    model = save_random(tmp_path / "toy", TOY, torch.float32, "cpu")

    class Wrong(Hosted):
        """Serves adapters whose B is half of what the reference has."""

        def _fetch(self, digest: str):  # type: ignore[no-untyped-def]
            weights = self.pool[digest]
            halves = {n: ModuleWeights(m.lora_a, m.lora_b / 2, 1.0) for n, m in weights.modules.items()}
            fetched = super()._fetch(digest)
            fetched._result = replace(weights, modules=halves)
            return fetched

    async def failed() -> list[Check]:
        hosted = Wrong(settings_of("native", "checks", str(model), "cpu"))
        await hosted.start()
        try:
            return [check async for check in run_checks(hosted, torch.float32) if not check["passed"]]
        finally:
            hosted.engine.stop()

    assert [check["name"] for check in asyncio.run(failed())] == ["equals the reference"]


def test_a_run_that_does_not_end_in_time_is_killed_with_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they would hold the device's memory, which the next run needs."""
    pid = tmp_path / "pid"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 60 &\necho $! > {pid}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    [end] = run_one("native", "checks", "model", "cpu", 3)
    assert end["end"] == "was cut off"
    deadline = time.monotonic() + 120
    while is_running(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_floor_does_not_read_an_embedding_that_is_only_looked_up(tmp_path: Path) -> None:
    save_file(
        {"model.embed_tokens.weight": torch.zeros(7, 3), "model.norm.weight": torch.zeros(3)},
        tmp_path / "a.safetensors",
    )
    assert weight_bytes(tmp_path) == 4 * 24
    save_file({"lm_head.weight": torch.zeros(7, 3).bfloat16()}, tmp_path / "b.safetensors")
    assert weight_bytes(tmp_path) == 4 * 3 + 2 * 21


def test_the_floor_reads_weights_adapters_and_keys_once_a_step() -> None:
    floor = Floor(bytes_per_s=1000.0, weight_bytes=500, adapter_bytes=50, kv_token_bytes=1)
    assert floor.tokens_per_s(Cell("base", 0, 1), 0, 500) == pytest.approx(1.0)
    assert floor.tokens_per_s(Cell("mixture", 8, 4), 8, 25) == pytest.approx(4 * 1000 / (500 + 400 + 100))


def test_figures_have_a_name_for_each_cell_and_count_the_checks() -> None:
    cell = {"decode_tokens_per_s": 50.0, "floor_tokens_per_s": 100.0}
    rows = [
        {"engine": "vllm", "what": "check", "passed": True},
        {"engine": "vllm", "what": "check", "passed": False},
        {"engine": "vllm", "what": "mixture 8 x32"} | cell,
    ]
    figures = figures_of(rows)
    assert (figures["gpu_vllm_checks_passed"], figures["gpu_vllm_checks_failed"]) == (1, 1)
    assert figures["gpu_vllm_mixture_8_x32_of_floor"] == 0.5
