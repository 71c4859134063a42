"""Every stage of the study on a tiny model: parts, adapters, choice, and the main table through the server's code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

from benchmarks.paper.answering import methods
from benchmarks.paper.answering.answers import Asker, describe_weights
from benchmarks.paper.answering.runs import Bench, run_all
from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.train_pool import train_all
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.model import quantization
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.loop import Engine
from lora_store import BASE_PLAN
from tests.benchmarks.tiny_study import SPECS
from tests.tiny import tiny_config

PER_TASK = 6


def test_an_adapter_is_a_folder_with_the_samples_part(workspace: Workspace, study: Study) -> None:
    folder = workspace.adapters / "animals"
    assert len((folder / "lora_samples.jsonl").read_text().splitlines()) == 20
    assert not {item.input for item in study.parts["animals"].samples} & {i.input for i in study.parts["animals"].test}
    assert load_file(folder / "adapter_model.safetensors")


def test_a_trained_adapter_is_not_trained_again(workspace: Workspace, tiny_folders: Mapping[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in workspace.adapters.rglob("*.safetensors")}
    with Progress(disable=True) as progress:
        train_all(SPECS, workspace, tiny_folders["gemma3"], progress)
    assert before == {path: path.stat().st_mtime_ns for path in workspace.adapters.rglob("*.safetensors")}


def test_every_method_of_the_main_table_answers_every_question(bench: Bench, tmp_path: Path) -> None:
    rows = run_all(bench, methods.MAIN, PER_TASK, tmp_path).to_pylist()
    counts = Counter(row["run"] for row in rows)
    assert counts == dict.fromkeys(methods.MAIN, PER_TASK * len(SPECS))
    assert bench.majority(PER_TASK).num_rows == PER_TASK * len(SPECS)
    by_run = {name: [row for row in rows if row["run"] == name] for name in counts}
    assert all(row["adapters"] == [row["task"]] and row["score"] == 1 for row in by_run["perfect"])
    assert all(row["strategy"] == "base" and not row["adapters"] for row in by_run["base"])
    assert sum(row["score"] for row in by_run["base"]) == 0
    assert all(row["task"] not in row["adapters"] for name in by_run if name.endswith("_ood") for row in by_run[name])
    assert all(len(row["adapters"]) == 3 for row in by_run["mixture_iid"])
    assert all(len(row["adapters"]) == 2 for row in by_run["fusion_ood"])  # three, without the masked own one
    assert sum(row["adapters"] == [row["task"]] for row in by_run["selection_iid"]) > 0.9 * counts["selection_iid"]
    assert len({tuple(row["adapters"]) for row in by_run["adaptersoup"]}) == 1


def test_answers_are_computed_once_and_found_by_the_next_run(
    bench: Bench, config: NativeWorkerConfig, workspace: Workspace
) -> None:
    pairs = [(question, BASE_PLAN) for question in bench.study.questions("test", 2)]
    texts = bench.asker.answers(pairs, Console(quiet=True), "base")
    again = Asker(bench.asker.engine, workspace.root / "answers.jsonl")
    assert again.num_new(pairs) == 0 and again.answers(pairs, Console(quiet=True), "base") == texts
    longer = [(replace(question, max_tokens=question.max_tokens + 1), plan) for question, plan in pairs]
    assert again.num_new(longer) == len(pairs)


def test_kept_answers_are_those_of_the_same_integers(
    make_engine: Callable[..., Engine], tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(kind: str) -> str:
        settings = {"dtype": "bfloat16", "quantization": kind}
        base = load_base_model(tiny_config(tiny_folders["gemma3"], **settings))
        return describe_weights(make_engine({}, base=base, **settings))

    found = [describe(kind) for kind in ("none", "int8", "int4")]
    assert found[0] == "torch.bfloat16" and len(set(found)) == 3
    assert describe("int4") == found[2]
    round_weight = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", lambda weight, *how: round_weight(weight * 1.01, *how))
    assert describe("int4") not in found, "the same setting rounds in another way"


def test_a_question_that_failed_stops_the_run_and_is_kept_as_no_answer(bench: Bench, workspace: Workspace) -> None:
    question = bench.study.questions("test", 1)[0]
    [plan] = methods.Perfect().plans(bench.retriever, [question])
    lost = replace(plan, adapters=(replace(plan.adapters[0], weights_digest="0" * 64),))
    asked = [(question, lost)]
    bench.asker.answers([(question, plan)], bench.out, "kept")  # another process may run the tests that ask before
    kept = (workspace.root / "answers.jsonl").read_text()
    with pytest.raises(Exception, match="0000"):
        bench.asker.answers(asked, bench.out, "lost")
    assert (workspace.root / "answers.jsonl").read_text() == kept and bench.asker.num_new(asked) == 1
