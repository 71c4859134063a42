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
    return _write(name, _circumstances() | {"figures": dict(figures), "runs": list(runs)}, [table])


def write_part(
    name: str, part: str, *, figures: Mapping[str, float], table: str, runs: Sequence[Mapping[str, Any]]
) -> Path:
    """Like `write_results`, where several scripts share a file: what the other parts wrote stays.

    `figures` of the file are those of all parts; its `runs` hold an entry a part, each with its own circumstances,
    figures and rows. What stands at its head is the last writer's. Raises: ValueError when another part has a figure
    of that name.
    """
    path = RESULTS / f"{name}.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    now = _circumstances()
    entry = {"part": part} | now | {"figures": dict(figures), "table": table.rstrip().split("\n"), "rows": list(runs)}
    entries = sorted([item for item in entries if item["part"] != part] + [entry], key=lambda item: item["part"])
    together: dict[str, float] = {}
    for item in entries:
        if taken := together.keys() & item["figures"].keys():
            raise ValueError(f"{item['part']} and another part of {name} both write {', '.join(sorted(taken))}")
        together |= item["figures"]
    return _write(name, now | {"figures": together, "runs": entries}, ["\n".join(item["table"]) for item in entries])


def _circumstances() -> dict[str, str]:
    return {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]).replace(str(Path.home()), "~"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write(name: str, content: Mapping[str, Any], tables: Sequence[str]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text("\n\n".join(table.rstrip() for table in tables) + "\n", encoding="utf-8")
    path = RESULTS / f"{name}.json"
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
