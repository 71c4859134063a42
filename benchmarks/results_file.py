"""Where a measurement is kept: one JSON file beside its table, with all that is needed to read it later."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, *, figures: Mapping[str, float], table: str, runs: Sequence[Mapping[str, Any]]) -> Path:
    """`results/<name>.json` and `<name>.txt` are written. `figures`: name -> number; `runs`: the rows behind them."""
    at_commit = commit()  # before this very file changes
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text(table.rstrip() + "\n", encoding="utf-8")
    content = {
        "machine": machine(),
        "commit": at_commit,
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": dict(figures),
        "runs": list(runs),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_shared_results(
    name: str, *, part: str, figures: Mapping[str, float], table: str, runs: Sequence[Mapping[str, Any]]
) -> Path:
    """Like `write_results`, for one of several parts of `results/<name>.json`; its figures are those of all parts.

    The part's table is `results/<name>-<part>.txt`.
    """
    at_commit = commit()  # before this very file changes
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{part}.txt").write_text(table.rstrip() + "\n", encoding="utf-8")
    path = RESULTS / f"{name}.json"
    parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    parts[part] = {
        "machine": machine(),
        "commit": at_commit,
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": dict(figures),
        "runs": list(runs),
    }
    together = {figure: value for one in parts.values() for figure, value in one["figures"].items()}
    content = {"parts": parts, "figures": together}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def machine() -> str:
    """Processor, cores, memory, torch: what a figure depends on."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {capability}, torch {torch.__version__}"


def commit() -> str:
    """The checked-out commit, with `+` when files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return run.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).stem
