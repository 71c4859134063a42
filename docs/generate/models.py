"""The model families that the engines were tried with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from benchmarks.results_file import RESULTS
from docs.generate.markdown import code, table
from tests.gpu_worker.families import EQUAL, MULTIMODAL, REFUSED, WITH_EXPERTS

_EQUAL = "served, equal"
_OWN_TESTS = ("gemma3_text", "llama", "mistral", "qwen3")  # of the engine, which run on them
_VLLM_OUTCOMES = {"equal": _EQUAL, "not compared": "vLLM's class was built with adapters, not compared"}
_NOT_STARTED = "vLLM did not start"
_VLLM_RESULTS = RESULTS / "families" / "results.json"  # of `tests.gpu_worker.conformance.run_families`


def families() -> str:
    """Return one row a family and engine: served and equal, or refused with the words of the message."""
    rows = sorted([*_native_rows(), *_vllm_rows()], key=lambda row: (row[0].lower(), row[1]))
    equal = Counter(engine for _, engine, seen in rows if _EQUAL in seen)
    counts = ", ".join(f"{number} with the {engine} engine" for engine, number in sorted(equal.items()))
    return f"Served and equal: {counts}.\n\n" + table(("family", "engine", "what was seen"), rows)


def _native_rows() -> Iterator[tuple[str, str, str]]:
    for name in (*EQUAL, *_OWN_TESTS):
        yield code(name), "native", f"{_EQUAL}, with adapters on experts" if name in WITH_EXPERTS else _EQUAL
    for name in MULTIMODAL:
        family, _, text = name.partition(" ")
        yield f"{code(family)} {text}".rstrip(), "native", f"text part {_EQUAL} to the whole model"
    for name, (_, reason) in REFUSED.items():
        yield code(name), "native", f"refused: {reason}"


def _vllm_rows() -> Iterator[tuple[str, str, str]]:
    """Yield what a run saw, nothing if there are no results."""
    if not _VLLM_RESULTS.exists():
        return
    content = json.loads(_VLLM_RESULTS.read_text(encoding="utf-8"))
    for row in (row for part in content["runs"] for row in part["rows"]):
        is_open = row.get("reason", "").startswith(_NOT_STARTED)  # perhaps the tiny model's fault
        seen = row["reason"] if is_open else f"{row['outcome']}: {row.get('reason')}"
        seen = _VLLM_OUTCOMES.get(row["outcome"], seen)
        yield code(row["family"]), "vllm", seen
