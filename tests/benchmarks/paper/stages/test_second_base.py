"""Two base models behind one index, on the tiny study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.train_pool import train_on
from benchmarks.paper.stages import second_base
from benchmarks.paper.stages.second_base import FIRST, SECOND, TwoBases, find_task, load_two
from benchmarks.paper.training.second_base import BaseRecipe, make_second_base
from benchmarks.training.adapter_files import BASE_NAME
from benchmarks.training.lora_training import Recipe
from gpu_worker.config import NativeWorkerConfig
from lora_store import LOCAL_TENANT
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import RECIPE
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def both(
    study: Study,
    workspace: Workspace,
    encoder: Encoder,
    config: NativeWorkerConfig,
    tiny_folders: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> TwoBases:
    """Return the tiny base, and one of two of its layers with adapters of its own."""
    own = Workspace(tmp_path_factory.mktemp("second"))
    base, texts = own.root / "base", [item.input for item in study.parts["animals"].train[:20]]
    recipe = BaseRecipe(2, Recipe(num_steps=2, batch_tokens=400, learning_rate=1e-2, vocabulary_len=300))
    make_second_base(tiny_folders["gemma3"], base, texts, texts[:2], recipe, lambda step, loss: None)
    parts = {name: replace(own, samples=own.train[:20]) for name, own in study.parts.items()}
    with Progress(disable=True) as progress:
        train_on(parts, dict.fromkeys(parts, RECIPE), own, base, progress, second_base.SECOND_NAME)
    configs = {FIRST: config, SECOND: tiny_config(base, max_model_len=400, max_step_tokens=600, max_wait_s=1e6)}
    return load_two(study, own, configs, encoder, Console(quiet=True))


def test_each_base_finds_and_uses_its_own_adapters_only(both: TwoBases) -> None:
    two = both
    names = {base: two._retriever.resolve(LOCAL_TENANT, f"animals.{base}").base_model for base in (FIRST, SECOND)}
    assert names == {FIRST: BASE_NAME, SECOND: second_base.SECOND_NAME}
    rows = two.answer(2).to_pandas()
    for base in (FIRST, SECOND):
        own = rows[rows["run"].isin([f"{way}_{base}" for way in ("perfect", "selection", "mixture")])]
        assert {name.rpartition(".")[2] for names in own["adapters"] for name in names} == {base}
        means = rows.groupby("run")["score"].mean()
        assert means[f"perfect_{base}"] == 1.0 > means[f"base_{base}"]
    mixed = rows[rows["run"].str.startswith("mixture")]["weights"]
    assert len(mixed) == 12 and all(list(weights) == pytest.approx([1 / 3] * 3, abs=1e-4) for weights in mixed)
    assert rows[rows["run"] == "selection_second"]["adapters"].map(len).eq(1).all()


def test_a_request_without_a_base_finds_adapters_of_both(both: TwoBases) -> None:
    questions = both.study.questions("test", 3)
    found = {base: both.routes(questions, base, 3) for base in (None, FIRST, SECOND)}
    bases = {
        base: {c.ref.name.rpartition(".")[2] for route in own for c in route.candidates} for base, own in found.items()
    }
    assert bases == {None: {FIRST, SECOND}, FIRST: {FIRST}, SECOND: {SECOND}}
    for routes in found.values():
        assert [find_task(route.candidates[0].ref) for route in routes] == [question.task for question in questions]
