"""The model families that the engines were tried with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from benchmarks.results_file import RESULTS
from docs.generate.markdown import code, table
from tests.gpu_worker.families import EQUAL, MULTIMODAL, REFUSED, REFUSED_UNLOADED, WITH_EXPERTS

_EQUAL = "served, equal"
_OWN_TESTS = ("gemma3_text", "llama", "mistral", "qwen3")  # of the engine, which run on them
_VLLM_OUTCOMES = {"equal": _EQUAL, "not compared": "vLLM's class was built with adapters, not compared"}
_WITHOUT_EXPERTS = {
    "ernie4_5_vl_moe": "without adapters on experts",
    "gpt_oss": "without adapters on experts, which have biases",
    **dict.fromkeys(("llama4", "llama4_text"), "without adapters on experts, whose inputs the router scales"),
}
_NOT_STARTED = "vLLM did not start"
# Of `tests.gpu_worker.conformance.run_families`, the second one with `--files`.
_VLLM_RESULTS, _VLLM_FILES = (RESULTS / study / "results.json" for study in ("families", "vllm_model_files"))
_REASONS = {
    "its class needs vLLM's second model runner, which this engine does not use": ("longcat_flash_ngram",),
    "its class asks for an attribute that it lacks": ("interns1_pro",),
    "vLLM has no CPU code for its window of generated tokens": ("unlimited_ocr",),
    "it reads the format of Mistral's own tools only": ("mistral_large_3",),
    "its class needs sound for every token": ("voxtral_realtime",),
    "it is code for GPUs only": (
        *("vllm.models.deepseek_v32", "vllm.models.glm5next", "vllm.models.hy_v4"),
        *("vllm.models.inkling", "vllm.models.qwen4_exp"),
    ),
    "an encoder-decoder architecture": ("whisper",),
}
_REASON_OF = {file: reason for reason, files in _REASONS.items() for file in files}


def families() -> str:
    """Return one row a family and engine: served and equal, or refused with the words of the message."""
    rows = sorted([*_native_rows(), *_vllm_rows()], key=lambda row: (row[0].lower(), row[1]))
    # A family counts once, whatever its variants in parentheses.
    equal = {(name.partition(" (")[0], engine) for name, engine, seen in rows if _EQUAL in seen}
    numbers = Counter(engine for name, engine in equal if not name.startswith("`quantised:"))
    counts = ", ".join(f"{number} families with the {engine} engine" for engine, number in sorted(numbers.items()))
    return f"Served and equal: {counts}.\n\n" + table(("family", "engine", "what was seen"), rows)


def _native_rows() -> Iterator[tuple[str, str, str]]:
    for name in (*EQUAL, *_OWN_TESTS):
        yield code(name), "native", f"{_EQUAL}, with adapters on experts" if name in WITH_EXPERTS else _EQUAL
    for name in MULTIMODAL:
        family, _, text = name.partition(" ")
        yield f"{code(family)} {text}".rstrip(), "native", f"text part {_EQUAL} to the whole model"
    for name, (_, reason) in (REFUSED | REFUSED_UNLOADED).items():
        yield code(name), "native", f"refused: {reason}"


def vllm_files() -> str:
    """Return how many of vLLM's model files have a family that is served and equal, and why the others have none."""
    seen = {family.replace("`", ""): text for family, _, text in _vllm_rows()}
    files = json.loads(_VLLM_FILES.read_text(encoding="utf-8"))["runs"]
    equal = [row for row in files if any(_EQUAL in seen.get(family, "") for family in row["families"])]
    named = sum(row["names_interface"] for row in files)
    served = sum(row["names_interface"] for row in equal)
    others: dict[str, list[str]] = {}
    for row in files:
        if row not in equal:
            tried = [f"{code(family)} {seen[family]}" for family in row["families"] if family in seen]
            reason = "; ".join(tried) or _REASON_OF.get(row["file"], "not tried")
            others.setdefault(reason, []).append(code(row["file"]))
    return (
        f"vLLM has {len(files)} files with models that generate text and take adapters: {named} name its interface for"
        f" LoRA, and {len(files) - named} inherit it. {len(equal)} of them have a family above that is served and"
        f" equal: {served} of the {named}, and {len(equal) - served} of the {len(files) - named}. The others:\n\n"
        + table(("files", "why"), [(", ".join(names), reason) for reason, names in others.items()])
    )


def _vllm_rows() -> Iterator[tuple[str, str, str]]:
    """Yield what a run saw, nothing if there are no results."""
    if not _VLLM_RESULTS.exists():
        return
    content = json.loads(_VLLM_RESULTS.read_text(encoding="utf-8"))
    for row in (row for part in content["runs"] for row in part["rows"]):
        is_open = row.get("reason", "").startswith(_NOT_STARTED)  # perhaps the tiny model's fault
        seen = row["reason"] if is_open else f"{row['outcome']}: {row.get('reason')}"
        seen = _VLLM_OUTCOMES.get(row["outcome"], seen)
        family, _, variant = row["family"].partition(" ")
        in_bfloat16 = " in bfloat16" if row.get("dtype") == "bfloat16" else ""
        known = _WITHOUT_EXPERTS.get(family)
        experts = ", with adapters on experts" if row.get("experts") else f", {known}" if known else ""
        yield f"{code(family)} {variant}".rstrip(), "vllm", f"{seen}{experts}{in_bfloat16}"
