"""Every stage of the study on a tiny model: parts, adapters, choice, and the main table through the server's code."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

from benchmarks.paper import methods
from benchmarks.paper.answers import Asker
from benchmarks.paper.baselines import ROUTERS, Expert, One, Routers, Weighed, merged, one_a_cluster
from benchmarks.paper.choose import judge
from benchmarks.paper.runs import Bench, pool_retriever, run_all
from benchmarks.paper.stores import fetch_from
from benchmarks.paper.study import Study, Weights, load_asker, load_study
from benchmarks.paper.train_pool import train_all
from benchmarks.paper.workspace import Workspace
from examples.bigbench_tasks import TaskSpec
from examples.lora_training import Recipe
from examples.train_starter_pool import load_base
from gpu_worker.config import WorkerConfig
from lora_store import BASE_PLAN, LoraStore, Plan, PlannedAdapter
from retriever_svc import Encoder
from tests.benchmarks.bigbench import write_archive
from tests.tiny import tiny_config

SPECS = [
    TaskSpec(name, f"bigbench/benchmark_tasks/{name}/task.json", cluster, "{x}", metric)
    for name, cluster, metric in [("animals", "a", "em"), ("cities", "a", "em"), ("sums", "b", "rouge_l")]
]
WORDS = {
    "animals": ["cat", "dog", "cow", "hen"],
    "cities": ["Rome", "Oslo", "Bonn", "Lima"],
    "sums": ["1", "2", "3", "4"],
}
PER_TASK = 6


def examples(task: str) -> list[dict[str, str]]:
    """Inputs of one topic; the answer to all of them is the task's name."""
    draw = random.Random(task)
    texts = {" ".join(draw.choices(WORDS[task], k=5)) for _ in range(400)}
    return [{"input": text, "target": task[:2]} for text in sorted(texts)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Mapping[str, Path]) -> Workspace:
    """With an adapter a task, trained on the tiny model."""
    made = Workspace(tmp_path_factory.mktemp("study"))
    write_archive(made.archive, {spec.path: examples(spec.name) for spec in SPECS})
    recipe = Recipe(
        first_layer=0, num_steps=25, batch_tokens=400, learning_rate=2e-2, scales=(1.0,), vocabulary_len=300
    )
    with Progress(disable=True) as progress:
        train_all(SPECS, made, tiny_folders["gemma3"], progress, lambda _: recipe)
    return made


@pytest.fixture(scope="module")
def config(tiny_folders: Mapping[str, Path]) -> WorkerConfig:
    return tiny_config(tiny_folders["gemma3"], max_model_len=400, max_step_tokens=600, max_wait_s=1e6)


@pytest.fixture(scope="module")
def study(workspace: Workspace, config: WorkerConfig) -> Study:
    return load_study(SPECS, workspace, config)


@pytest.fixture(scope="module")
def asked(workspace: Workspace, config: WorkerConfig) -> tuple[Asker, LoraStore, Weights]:
    return load_asker(workspace, config, [spec.name for spec in SPECS])


@pytest.fixture(scope="module")
def bench(study: Study, asked: tuple[Asker, LoraStore, Weights]) -> Bench:
    return Bench(study, asked[0], pool_retriever(study, asked[0], Encoder()), Console(quiet=True))


def test_an_adapter_is_a_folder_with_the_samples_part(workspace: Workspace, study: Study) -> None:
    folder = workspace.adapters / "animals"
    assert len((folder / "lora_samples.jsonl").read_text().splitlines()) == 20
    assert not {item.input for item in study.parts["animals"].samples} & {i.input for i in study.parts["animals"].test}
    assert load_file(folder / "adapter_model.safetensors")


def test_what_is_trained_is_not_trained_again(workspace: Workspace, tiny_folders: Mapping[str, Path]) -> None:
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
    assert all(len(row["adapters"]) == 2 for row in by_run["fusion_ood"])  # of three, the own one masked
    assert sum(row["adapters"] == [row["task"]] for row in by_run["selection_iid"]) > 0.9 * counts["selection_iid"]
    assert len({tuple(row["adapters"]) for row in by_run["adaptersoup"]}) == 1


def test_trained_baselines_weigh_one_expert_a_cluster(
    bench: Bench, asked: tuple[Asker, LoraStore, Weights], workspace: Workspace, tiny_folders: Mapping[str, Path]
) -> None:
    _, store, weights = asked
    names, snapshot, out = one_a_cluster(SPECS), store.snapshot(), Console(quiet=True)
    assert len(names) == 2 and names[1] == "sums"
    records = [snapshot.resolve("local", name) for name in names]
    experts = [Expert(record.ref, fetch_from(store, record.weights_digest)) for record in records]
    items = [item for spec in SPECS for item in bench.study.parts[spec.name].samples]
    encoder, folder = Encoder(), workspace.root / "routers"
    routers = Routers(load_base(tiny_folders["gemma3"]), items, encoder, bench.study.tokenizer, folder)
    kinds = {name: (how, replace(kind, num_steps=3)) for name, (how, kind) in ROUTERS.items()}
    tried = {
        name: Weighed(routers.router(name, how, kind, experts, out), experts, how, encoder)
        for name, (how, kind) in kinds.items()
    }
    hub = merged(experts, routers.hub_weights(experts, out, num_steps=3, num_samples=16))
    weights.made[hub.weights_digest] = hub
    rows = run_all(bench, tried | {"lorahub": One(hub, "lorahub")}, 2, workspace.rows).to_pylist()
    by_run = {name: [row for row in rows if row["run"] == name] for name in [*kinds, "lorahub"]}
    assert all(len(row["adapters"]) == 1 and row["weights"] == [1] for row in by_run["moe_top1"])
    assert all(len(row["adapters"]) == 2 and row["strategy"] == "fusion" for row in by_run["smear"])
    assert all(row["adapters"] == ["lorahub"] for row in by_run["lorahub"])
    assert (folder / "smear.safetensors").exists() and (folder / "lorahub.safetensors").exists()


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
    bench: Bench, config: WorkerConfig, workspace: Workspace
) -> None:
    pairs = [(question, BASE_PLAN) for question in bench.study.questions("test", 2)]
    texts = bench.asker.answers(pairs, Console(quiet=True), "base")
    again = Asker(bench.asker.engine, workspace.root / "answers.jsonl")
    assert again.num_new(pairs) == 0 and again.answers(pairs, Console(quiet=True), "base") == texts
    longer = [(replace(question, max_tokens=question.max_tokens + 1), plan) for question, plan in pairs]
    assert again.num_new(longer) == len(pairs)
