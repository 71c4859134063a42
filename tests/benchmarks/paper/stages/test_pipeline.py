"""Every stage of the study on a tiny model: parts, adapters, choice, and the main table through the server's code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

from benchmarks.paper.answering import methods
from benchmarks.paper.answering.answers import Asker, Question
from benchmarks.paper.answering.runs import Bench, run_all
from benchmarks.paper.answering.stores import fetch_from
from benchmarks.paper.answering.study import Study, Weights
from benchmarks.paper.common.expert_draws import one_a_cluster
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool import choose
from benchmarks.paper.pool.choose import judge
from benchmarks.paper.pool.train_pool import train_all
from benchmarks.paper.stages.baselines import ROUTERS, Expert, One, merged, trained_baselines, with_others
from benchmarks.paper.stages.main_table import Loaded
from gpu_worker.config import NativeWorkerConfig
from lora_store import BASE_PLAN, LoraStore, Plan, PlannedAdapter
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import SPECS

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


def test_adapters_that_learnt_their_task_are_judged_by_the_choice_part(
    study: Study, asked: tuple[Asker, LoraStore, Weights]
) -> None:
    verdicts = judge(study, asked[1], asked[0], Console(quiet=True), PER_TASK)
    assert verdicts["animals"].own == 1.0 and verdicts["animals"].reference == 1.0  # all have one answer
    assert not verdicts["animals"].is_kept


@pytest.mark.parametrize("is_base_right", [True, False])
def test_an_adapter_has_to_beat_the_base_model_too(
    study: Study, asked: tuple[Asker, LoraStore, Weights], monkeypatch: pytest.MonkeyPatch, is_base_right: bool
) -> None:
    """This test uses a task where guessing is never right, whatever the metric."""

    def answers(pairs: Sequence[tuple[Question, Plan]], out: Console, name: str) -> list[str]:
        rights = [(plan == BASE_PLAN) == is_base_right for _, plan in pairs]
        return [question.item.answers[0] if right else "?" for (question, _), right in zip(pairs, rights, strict=True)]

    monkeypatch.setattr(asked[0], "answers", answers)
    monkeypatch.setattr(choose, "majority_scores", lambda spec, train, items: [0.0] * len(items))
    verdicts = judge(study, asked[1], asked[0], Console(quiet=True), PER_TASK)
    assert {spec.name for spec in SPECS} == verdicts.keys() and {spec.metric for spec in SPECS} == {"em", "rouge_l"}
    for found in verdicts.values():
        assert (found.own, found.reference) == ((0.0, 1.0) if is_base_right else (1.0, 0.0))
        assert found.is_kept is not is_base_right


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


def test_trained_baselines_weigh_one_expert_per_cluster(loaded: Loaded, encoder: Encoder) -> None:
    names, bench = one_a_cluster(SPECS), loaded.bench
    assert len(names) == 2 and names[1] == "sums"
    kinds = {name: (how, replace(kind, num_steps=3)) for name, (how, kind) in ROUTERS.items()}
    methods = trained_baselines(loaded, encoder, kinds, num_hub_steps=2)
    rows = run_all(bench, methods, 2, bench.study.workspace.rows).to_pylist()
    by_run = {name: [row for row in rows if row["run"] == name] for name in methods}
    assert methods.keys() == {*kinds, "lorahub"}
    assert all(len(row["adapters"]) == 1 and row["weights"] == [1] for row in by_run["moe_top1"])
    assert all(row["adapters"] == names and row["strategy"] == "fusion" for row in by_run["smear"])
    assert all(row["adapters"] == ["lorahub"] for row in by_run["lorahub"])
    kept = {path: path.stat().st_mtime_ns for path in (bench.study.workspace.root / "routers").glob("*.safetensors")}
    assert {path.name.rpartition("-")[0] for path in kept} >= {*ROUTERS, "lorahub"}
    again, questions = trained_baselines(loaded, encoder, kinds, num_hub_steps=2), bench.study.questions("test", 1)
    for name, method in methods.items():
        assert again[name].plans(bench.retriever, questions) == method.plans(bench.retriever, questions), name
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    one = {"smear": kinds["smear"]}
    assert trained_baselines(loaded, encoder, one, num_hub_steps=0).keys() == {"smear"}


def test_measuring_one_baseline_keeps_the_rows_of_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    old, new = pa.table({"run": ["a", "b", "b"], "score": [1, 2, 3]}), pa.table({"run": ["b"], "score": [4]})
    assert with_others(old, path) == old
    pq.write_table(old, path)
    assert with_others(new, path).to_pydict() == {"run": ["a", "b"], "score": [1, 4]}
    scored = new.append_column("without_dots", [[0.5]])
    assert with_others(scored, path)["without_dots"].to_pylist() == [None, 0.5]  # the rows before have no such column


def test_merged_adapters_are_the_servers_fusion(bench: Bench, asked: tuple[Asker, LoraStore, Weights]) -> None:
    _, store, weights = asked
    snapshot = store.snapshot()
    records = [snapshot.resolve("local", spec.name) for spec in SPECS]
    experts = [Expert(record.ref, fetch_from(store, record.weights_digest)) for record in records]
    shares = [0.5, 0.3, -0.2]
    one = merged(experts, torch.tensor(shares))
    weights.made[one.weights_digest] = one
    plan = Plan(
        "fusion",
        tuple(PlannedAdapter(e.ref, e.weights.weights_digest, w) for e, w in zip(experts, shares, strict=True)),
    )
    questions = bench.study.questions("test", 2)
    fused = bench.asker.answers([(question, plan) for question in questions], Console(quiet=True), "fusion")
    made = One(one, "made").plans(bench.retriever, questions)
    assert bench.asker.answers(list(zip(questions, made, strict=True)), Console(quiet=True), "made") == fused


def test_answers_are_computed_once_and_found_by_the_next_run(
    bench: Bench, config: NativeWorkerConfig, workspace: Workspace
) -> None:
    pairs = [(question, BASE_PLAN) for question in bench.study.questions("test", 2)]
    texts = bench.asker.answers(pairs, Console(quiet=True), "base")
    again = Asker(bench.asker.engine, workspace.root / "answers.jsonl")
    assert again.num_new(pairs) == 0 and again.answers(pairs, Console(quiet=True), "base") == texts
    longer = [(replace(question, max_tokens=question.max_tokens + 1), plan) for question, plan in pairs]
    assert again.num_new(longer) == len(pairs)


def test_a_question_that_failed_stops_the_run_and_is_kept_as_no_answer(bench: Bench, workspace: Workspace) -> None:
    question = bench.study.questions("test", 1)[0]
    [plan] = methods.Perfect().plans(bench.retriever, [question])
    lost = replace(plan, adapters=(replace(plan.adapters[0], weights_digest="0" * 64),))
    asked = [(question, lost)]
    kept = (workspace.root / "answers.jsonl").read_text()
    with pytest.raises(Exception, match="0000"):
        bench.asker.answers(asked, bench.out, "lost")
    assert (workspace.root / "answers.jsonl").read_text() == kept and bench.asker.num_new(asked) == 1
