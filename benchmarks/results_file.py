"""Write the results of a study to its own folder: the numbers with their circumstances, and a table."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

RESULTS = Path(__file__).parent / "results"
UNCLEAN = ".unclean"  # in the names of files that git ignores


class TreeChanged(Exception):
    """The results are of a tree with local changes, which no commit names."""


def write_results(
    study: str,
    *,
    figures: Mapping[str, float],
    table: str,
    runs: Sequence[Mapping[str, Any]],
    keeps_other_processors: bool = False,
) -> Path:
    """Write `results.json` and `table.txt` in `results/<study>/` and return the path of the JSON file.

    `figures`: numbers by name; `runs`: the raw rows behind them. `keeps_other_processors`: if `results.json` is of a
    processor of another kind, write `results.<kind>.json` and `table.<kind>.txt` instead.
    """
    content = _circumstances() | {"figures": dict(figures), "runs": list(runs)}
    return _write(study, content, [table], _suffix(study) if keeps_other_processors else "")


def change_suffix() -> str:
    """Return what the name of a file of results gets: UNCLEAN in a tree with local changes, else ""."""
    return UNCLEAN if commit().endswith("+") else ""


def processor_of(machine: str) -> str:
    """Return the kind of processor by a machine's description: its vendor, and AVX2 if it has no AVX-512."""
    vendor = re.findall(r"^[a-z]*", machine.lower())[0]
    return f"{vendor}-avx2" if ", AVX2," in machine else vendor


def _suffix(study: str) -> str:
    path, own = RESULTS / study / "results.json", processor_of(machine())
    first = processor_of(json.loads(path.read_text(encoding="utf-8"))["machine"]) if path.exists() else own
    return "" if first == own else f".{own}"


def write_part(
    study: str,
    part: str,
    *,
    figures: Mapping[str, float],
    table: str,
    runs: Sequence[Mapping[str, Any]],
    keeps_other_processors: bool = False,
) -> Path:
    """Write one part of a study that several scripts share, and keep the other parts.

    The file's `figures` are those of all parts. Its `runs` have one entry for each part with the circumstances, numbers
    and rows of that part. The circumstances at the top level are those of the last writer. `keeps_other_processors`:
    see `write_results`.
    Raises: ValueError if another part has a number of the same name.
    """
    (RESULTS / study).mkdir(parents=True, exist_ok=True)
    with FileLock(RESULTS / study / ".lock"):
        return _write_part(study, part, figures, table, runs, _suffix(study) if keeps_other_processors else "")


def _write_part(
    study: str, part: str, figures: Mapping[str, float], table: str, runs: Sequence[Mapping[str, Any]], suffix: str
) -> Path:
    path = RESULTS / study / f"results{suffix}.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    now = _circumstances()
    entry = {"part": part} | now | {"figures": dict(figures), "table": table.rstrip().split("\n"), "rows": list(runs)}
    entries = sorted([item for item in entries if item["part"] != part] + [entry], key=lambda item: item["part"])
    together: dict[str, float] = {}
    for item in entries:
        if taken := together.keys() & item["figures"].keys():
            raise ValueError(f"{item['part']} and another part of {study} both write {', '.join(sorted(taken))}")
        together |= item["figures"]
    tables = ["\n".join(item["table"]) for item in entries]
    return _write(study, now | {"figures": together, "runs": entries}, tables, suffix)


def _circumstances() -> dict[str, str]:
    return {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python", "-m", _module_name(), *map(_without_folders, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _without_folders(argument: str) -> str:
    """Return the argument with an absolute path cut to its last part, as the folders are of one machine only."""
    return Path(argument).name if argument.startswith("/") else argument


def _write(study: str, content: Mapping[str, Any], tables: Sequence[str], suffix: str = "") -> Path:
    """Write both files. Those of a changed tree are written next to them, which git ignores, and refused.

    Raises: TreeChanged.
    """
    is_changed = content["commit"].endswith("+")
    if is_changed:
        suffix += UNCLEAN
    folder = RESULTS / study
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"table{suffix}.txt").write_text("\n\n".join(table.rstrip() for table in tables) + "\n", encoding="utf-8")
    path = folder / f"results{suffix}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    if is_changed:
        raise TreeChanged(f"the results are of a tree with local changes, so they are in {path.name} only: commit them")
    return path


def machine() -> str:
    """Describe the machine: processor, cores, memory, torch."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {capability}, torch {torch.__version__}"


def commit() -> str:
    """Return the checked-out commit, followed by `+` if files other than results differ from it."""
    root = Path(__file__).parents[1]
    named = subprocess.run(["git", "describe", "--always", "--abbrev=12"], capture_output=True, text=True, cwd=root)
    changed = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    is_changed = bool(named.stdout) and subprocess.run(changed, capture_output=True, cwd=root).returncode != 0
    return (named.stdout.strip() or "unknown") + ("+" if is_changed else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).stem
