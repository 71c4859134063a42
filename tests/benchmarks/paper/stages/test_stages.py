"""The stages of `all` on the tiny study: each writes its rows and its section, and a second run sends no request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

from benchmarks import plots, results_file
from benchmarks.paper.__main__ import STAGES, run_stages
from benchmarks.paper.answering.margin import Rule
from benchmarks.paper.answering.methods import MAIN
from benchmarks.paper.answering.runs import Bench, run_all
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import Parts
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.train_pool import train_on
from benchmarks.paper.stages import ablations, answer_tables, conflicts, gate, mixed_pool, shares, speed
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.paper.training.ramole import GatedModel, GateRecipe
from benchmarks.training.adapter_files import load_base
from benchmarks.training.bigbench_tasks import Item
from benchmarks.training.lora_training import Recipe
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import RECIPE, SPECS

PER_TASK = 2
RULE = Rule(0.1, True)


class Stages:
    """Every stage that sends requests, at its smallest size."""

    def __init__(self, loaded: Loaded, encoder: Encoder, base: Path, results: Path) -> None:
        self.loaded, self.encoder, self.base, self.results = loaded, encoder, base, results
        self.broken = ""
        self.by_name: dict[str, Callable[[], None]] = {
            "main_table": self.main_table,
            "ablations": self.ablations,
            "shares": self.shares,
            "conflicts": self.conflicts,
            "mixed_pool": self.mixed_pool,
            "gate": self.gate,
            "speed": self.speed,
        }

    def __call__(self, name: str, arguments: Sequence[str]) -> None:
        if name == self.broken:
            raise RuntimeError(name)
        self.by_name[name]()

    def main_table(self) -> None:
        bench = self.loaded.bench
        rows = run_all(bench, MAIN, PER_TASK, bench.study.workspace.rows)
        write_parquet(self.results / answer_tables.ROWS, pa.concat_tables([rows, bench.majority(PER_TASK)]))
        answer_tables.write_tables(self.results, "tiny")

    def ablations(self) -> None:
        bench = self.loaded.bench
        rows = run_all(bench, ablations.methods_of(), PER_TASK, bench.study.workspace.rows)
        write_parquet(self.results / ablations.ROWS, rows)
        ablations.write_tables(self.results)

    def shares(self) -> None:
        rows = shares.share_rows(self.loaded.bench, {"nothing": self.encoder}, PER_TASK)
        self.write("shares.md", shares.section(rows.to_pandas()))

    def conflicts(self) -> None:
        study, [spec] = self.loaded.bench.study, SPECS[:1]
        copies = {
            f"{spec.name}{end}": parts
            for end, parts in conflicts.copies_of(two_answers(study.parts[spec.name])).items()
        }
        self.train(copies, dict.fromkeys(copies, replace(RECIPE, num_steps=3)), study.workspace)
        rows, rules = conflicts.Conflicts(self.loaded, [spec], copies).rows(self.encoder, PER_TASK)
        margins = conflicts.margin_rows(self.loaded.bench, {"iid": RULE, "ood": RULE}, PER_TASK)
        self.rows = rows.to_pandas()
        text = conflicts.section(self.rows, margins.to_pandas(), rules, {"iid": RULE, "ood": RULE})
        assert all(f"{pool}: {rules[pool]}" in text for pool in ("plain", "flipped", "halved"))
        self.write("conflicts.md", text)

    def mixed_pool(self) -> None:
        study = self.loaded.bench.study
        mixed = Workspace(study.workspace.root / "mixed_pool")
        variants = mixed_pool.variants_of(list(study.specs))
        shaped = {task: mixed_pool.mixed_recipe(study.specs[task], name) for task, name in variants.items()}
        recipes = {task: replace(recipe, first_layer=0, num_steps=3) for task, recipe in shaped.items()}
        self.train(study.parts, recipes, mixed)
        bench = self.loaded.bench
        other = mixed_pool.mixed_bench(bench, study, mixed)
        pools = {"uniform": bench, "mixed": other}
        rows = pa.concat_tables(
            [mixed_pool.pool_rows(own, self.encoder, kind, PER_TASK) for kind, own in pools.items()]
        )
        self.write("mixed_pool.md", mixed_pool.section(rows.to_pandas(), variants))

    def gate(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        learnt = [spec.name for spec in SPECS[:2]]
        gates = gate.Gates(load_base(self.base), gate.adapters_of(self.loaded), tokenizer, learnt)
        gate.measure(self.loaded, self.encoder, gates, self.results, PER_TASK, GateRecipe(num_steps=2))

    def speed(self) -> None:
        speed.measure(self.loaded.bench, MAIN, self.results, num_questions=2, num_rounds=1)
        speed.write_tables(self.results)

    def train(self, parts: Mapping[str, Parts], recipes: Mapping[str, Recipe], workspace: Workspace) -> None:
        with Progress(disable=True) as progress:
            train_on(parts, recipes, workspace, self.base, progress)

    def write(self, name: str, text: str) -> None:
        (self.results / name).write_text(text)


def two_answers(parts: Parts) -> Parts:
    return replace(
        parts, train=tuple(replace(item, answers=("an" if n % 3 else "no",)) for n, item in enumerate(parts.train))
    )


def test_stages_continue_after_a_failure_and_ask_nothing_twice(
    loaded: Loaded,
    encoder: Encoder,
    tiny_folders: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    stages = Stages(loaded, encoder, tiny_folders["gemma3"], tmp_path)
    chosen = [stage for stage in STAGES if stage.name in stages.by_name]
    stages.broken = "gate"
    with pytest.raises(RuntimeError):
        run_stages(chosen, stages, Console(quiet=True))
    stages.broken = ""
    counters = loaded.bench.asker.engine.counters
    before = counters.num_requests
    unasked = [stage for stage in chosen if stage.name != "speed"]
    run_stages(unasked, stages, Console(quiet=True))
    assert counters.num_requests == before
    run_stages(chosen[-1:], stages, Console(quiet=True))
    before = counters.num_requests
    run_stages(chosen[-1:], stages, Console(quiet=True))
    assert before == counters.num_requests > 0
    written = {path.stem for path in tmp_path.glob("*.md")}
    assert written == {"answers" if stage.name == "main_table" else stage.name for stage in chosen}
    check_conflicts(stages.rows)
    check_mixed_pool(loaded.bench.study.workspace.root / "mixed_pool" / "adapters")
    check_gate(pd.read_parquet(tmp_path / gate.ROWS))
    check_speed(pd.read_parquet(tmp_path / speed.THROUGHPUT), pd.read_parquet(tmp_path / speed.LATENCY))


def check_conflicts(rows: pd.DataFrame) -> None:
    """Check that each run uses its combination, and that each pool has the adapters its name states."""
    adapters = rows.groupby("run")["adapters"].agg(lambda found: {name for names in found for name in names})
    assert adapters["halves_fusion"] == {"animals.half1", "animals.half2"}
    assert adapters["own_flipped_0.25"] == {"animals", "animals.flipped"}
    assert adapters["halves_flipped"] == {"animals.half1", "animals.half2", "animals.flipped"}
    assert adapters["plain_mixture"] == {"animals", "cities", "sums"}
    assert adapters["halved_mixture"] <= {"animals.half1", "animals.half2", "cities", "sums"}
    assert {"animals", "animals.flipped"} <= adapters["flipped_mixture"]
    assert set(rows["task"]) == {"animals"}


def check_mixed_pool(adapters: Path) -> None:
    """Check that each task's adapter has the shape given by its recipe."""
    for task, name in mixed_pool.variants_of([spec.name for spec in SPECS]).items():
        config, recipe = json.loads((adapters / task / "adapter_config.json").read_text()), mixed_pool.VARIANTS[name]
        assert (config["r"], config["use_rslora"]) == (recipe.rank, recipe.use_rslora)
        assert set(config["target_modules"]) == set(recipe.modules)


def check_gate(rows: pd.DataFrame) -> None:
    """Check that every way of weighing answers every question, without the own adapter if that is masked."""
    assert set(rows["run"]) == {f"{way}_{pool}" for way in gate.WAYS for pool in gate.POOLS}
    assert rows[rows["run"] == "uniform_iid"]["adapters"].map(len).eq(3).all()
    sums = rows.set_index("run")["weights"].map(sum)
    assert np.allclose(sums, 1, atol=1e-3)
    assert rows[rows["run"] == "uniform_iid"]["weights"].map(lambda own: np.allclose(own, 1 / 3, atol=1e-3)).all()
    assert rows[rows["run"] == "gate_iid"]["weights"].map(lambda own: np.ptp(own) > 1e-4).any()
    assert not any(task in names for task, names in rows[rows["run"] == "gate_ood"][["task", "adapters"]].to_numpy())


def check_speed(throughput: pd.DataFrame, latency: pd.DataFrame) -> None:
    assert (throughput.groupby(["round", "new_tokens", "batch", "method"]).size() == 1).all()
    full = throughput.groupby(["new_tokens", "method"])["tokens"].max().unstack(0)
    assert (full[speed.FULL] - full[speed.FIRST] == 2 * (speed.FULL - speed.FIRST)).all()
    assert (latency[["first_ms", "token_ms"]] > 0).all(axis=None) and set(latency["method"]) == set(MAIN)
    assert set(latency[latency["plan_ms"] == 0]["method"]) == {"adaptersoup"}


def test_the_gate_learns_the_tasks_its_encoder_learnt(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"num_texts_of_task": {"c": 20, "a": 20, "gone": 20}}))
    names = ["a", "b", "c", "d", "e"]
    assert gate.learnt_by(str(tmp_path), names) == ["a", "c"]
    untrained = gate.learnt_by("all-MiniLM-L6-v2", names)
    assert len(untrained) == 2 and set(untrained) < set(names)


def test_the_gate_is_trained_on_learnt_tasks_with_their_adapters_alone(
    loaded: Loaded, tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(model: GatedModel, examples: Sequence[object], *rest: object) -> None:
        seen.append((model.num_adapters, len(examples)))

    monkeypatch.setattr(gate, "train_gates", train)
    base, study = tiny_folders["gemma3"], loaded.bench.study
    adapters, tokenizer = gate.adapters_of(loaded), AutoTokenizer.from_pretrained(base)
    for number in (1, 2):
        learnt = [spec.name for spec in SPECS[:number]]
        gates = gate.Gates(load_base(base), adapters, tokenizer, learnt)
        assert gates.trained(loaded.bench, GateRecipe(num_steps=number, seed=7)).num_adapters == len(SPECS)
        num_examples = sum(min(40, len(study.parts[name].train)) for name in learnt)
        assert seen[-1] == (number, num_examples)


def test_the_section_separates_the_gates_training_tasks() -> None:
    """The gate is right on its training task only; the other ways are never right."""
    rows = [
        {"run": f"{way}_{pool}", "task": task, "number": 0, "score": float(way == "gate" and task == "a")}
        | {"adapters": [task, "x"], "weights": [0.5, 0.5]}
        for way in gate.WAYS
        for pool in gate.POOLS
        for task in "abc"
    ]
    lines = [line.strip("| ").split(" | ") for line in gate.section(pd.DataFrame(rows), ["a"]).splitlines()]
    found = {cells[1]: cells[4].split(" ")[0] for cells in lines if cells[0] == "ood"}
    assert found == {"all": "33.3", "1 in the gate's training": "100.0", "2 not in it": "0.0"}
    assert "own adapters in the mixture: 50.0 (50.0 to 50.0) percent" in gate.section(pd.DataFrame(rows), ["a"])


def test_a_gates_weight_counts_only_where_the_own_adapter_is_in_the_mixture(tmp_path: Path) -> None:
    rows = [("a", ["a", "x"], [0.9, 0.1]), ("a", ["x", "y"], [0.5, 0.5]), ("b", ["x", "b"], [0.7, 0.3])]
    table = pd.DataFrame([{"run": "gate_iid", "task": t, "adapters": a, "weights": w} for t, a, w in rows])
    found = gate.own_weight(table)
    assert found is not None and found.mean == pytest.approx(0.6)
    table.to_parquet(tmp_path / gate.ROWS)
    assert gate.sentence(tmp_path).endswith(
        "60.0 (30.0 to 90.0) % of the weight to the own adapter; equal weights give 33.3 %."
    )
    table["weights"] = [[1 / 3, 1 / 3]] * 3
    assert gate.own_weight(table) is None


def test_the_sentence_separates_the_gates_training_tasks(tmp_path: Path) -> None:
    rows = [
        {"run": f"{way}_iid", "task": task, "number": 0, "score": float(way == "gate" and task == "a")}
        | {"adapters": [task, "x"], gate.IN_TRAINING: task == "a"}
        | {"weights": [0.75, 0.25] if task == "a" else [0.5, 0.5]}
        for way in gate.WAYS
        for task in "abc"
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / gate.ROWS)
    found = gate.sentence(tmp_path)
    assert "training it gives 75.0 (75.0 to 75.0) %, and changes right answers by 100.0 (100.0 to 100.0)" in found
    assert found.endswith("not seen, 50.0 (50.0 to 50.0) % and 0.0 (0.0 to 0.0).")


def test_one_adapter_serves_a_batch_or_each_question_has_its_own(bench: Bench) -> None:
    questions = bench.study.questions("test", 2)
    assert len({question.task for question in questions}) == len(SPECS)
    count = {
        name: len({plan.adapters for plan in method.plans(bench.retriever, questions)})
        for name, method in speed.BATCHED.items()
        if name in ("one adapter", "own adapter each")
    }
    assert count == {"one adapter": 1, "own adapter each": len(SPECS)}


def test_each_pool_of_conflicts_follows_its_own_rule(
    loaded: Loaded, encoder: Encoder, tiny_folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = iter([Rule(0.0, False), Rule(0.0, True), Rule(0.0, False)])  # plain mixes, flipped selects, halved mixes
    stages, study, [spec] = Stages(loaded, encoder, tiny_folders["gemma3"], tmp_path), loaded.bench.study, SPECS[:1]
    parts = conflicts.copies_of(two_answers(study.parts[spec.name]))
    copies = {f"{spec.name}{end}": own for end, own in parts.items()}
    stages.train(copies, dict.fromkeys(copies, replace(RECIPE, num_steps=3)), study.workspace)
    monkeypatch.setattr(conflicts, "chosen_rule", lambda bench, per_task, *, masks_own: next(chosen))
    rows = conflicts.Conflicts(loaded, [spec], copies).rows(encoder, PER_TASK)[0].to_pandas()
    strategies = {
        pool: set(rows[rows["run"] == f"{pool}_margin"]["strategy"]) for pool in ("plain", "flipped", "halved")
    }
    assert strategies == {"plain": {"mixture"}, "flipped": {"selection"}, "halved": {"mixture"}}


def test_a_tasks_further_adapters_are_of_halves_and_of_exchanged_answers() -> None:
    train = tuple(Item(f"{n}", ("abc"[n % 3],)) for n in range(60))
    copies = conflicts.copies_of(Parts(train, (), (), ()))
    halves = [copies[end].train for end in conflicts.HALVES]
    assert sorted(item.input for half in halves for item in half) == sorted(item.input for item in train)
    assert all(len(half) == 30 for half in halves)
    flipped = copies[conflicts.FLIPPED].train
    assert [item.answers[0] for item in flipped[:3]] == ["b", "c", "a"]
    assert all(len(parts.samples) == 20 and set(parts.samples) <= set(parts.train) for parts in copies.values())


def test_the_mixed_pool_has_siblings_of_different_recipes() -> None:
    names = [f"{cluster}{n}" for cluster, count in (("a", 6), ("b", 2), ("c", 5), ("d", 4)) for n in range(count)]
    specs = [replace(SPECS[0], name=name, cluster=name[0]) for name in names]
    tasks = mixed_pool.chosen_tasks(specs)
    assert [spec.name for spec in tasks] == [f"{cluster}{n}" for cluster in "acd" for n in range(4)]
    variants = mixed_pool.variants_of([spec.name for spec in tasks])
    assert all(len({variants[f"{cluster}{n}"] for n in range(4)}) == 4 for cluster in "acd")
