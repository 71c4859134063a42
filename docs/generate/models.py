"""The model families that the engines were tried with."""

from __future__ import annotations

import json

from benchmarks.results_file import RESULTS
from docs.generate.markdown import code, table
from tests.gpu_worker.families import EQUAL, REFUSED


def equal_families() -> str:
    """Return the families whose logits equal those of transformers, in alphabetical order."""
    return ", ".join(code(name) for name in sorted(EQUAL)) + "\n"


def refused_families() -> str:
    """Return the families that are refused at the start, with the part of the message that says why."""
    return table(("family", "the message names"), [(code(name), REFUSED[name][1]) for name in sorted(REFUSED)])


def vllm_families() -> str:
    """Return what was seen of each family with the vLLM engine, from the results of `benchmarks.families`."""
    content = json.loads((RESULTS / "families" / "results.json").read_text(encoding="utf-8"))
    rows = [row for part in content["runs"] for row in part["rows"]]
    order = ("equal", "not compared", "refused", "fails")
    cells = []
    for row in sorted(rows, key=lambda row: (order.index(row["outcome"]), row["family"])):
        modules = ", ".join(code(name) for name in row.get("modules", ()))
        cells.append((code(row["family"]), row["outcome"], modules or row["reason"].replace("|", "\\|")))
    num = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in order}
    summary = f"{num['equal']} families are equal, {num['not compared']} were built and not compared, "
    summary += f"{num['refused'] + num['fails']} do not start.\n\n"
    return summary + table(("family", "seen", "modules that adapters may target, or the reason"), cells)
