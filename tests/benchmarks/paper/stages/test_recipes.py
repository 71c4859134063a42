"""Other trainings of the same adapters, on the tiny study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.progress import Progress

from benchmarks.paper.common.intervals import bootstrap
from benchmarks.paper.pool.train_pool import train_on
from benchmarks.paper.stages import recipes
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.main_table import Loaded
from benchmarks.paper.stages.mixed_pool import METHODS
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import RECIPE, SPECS


def test_each_kind_changes_one_setting_of_the_recipe() -> None:
    changed = {
        kind: [
            name
            for name in ("seed", "scales", "learning_rate", "num_steps", "rank")
            if getattr(recipes.recipe_for(RECIPE, kind), name) != getattr(RECIPE, name)
        ]
        for kind in recipes.KINDS
    }
    assert changed == {
        "seed0": [],
        "seed1": ["seed"],
        "seed2": ["seed"],
        "scales": ["scales"],
        "slow": ["learning_rate"],
    }


def test_every_pool_has_its_own_adapters(
    loaded: Loaded, encoder: Encoder, tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "KINDS", ("seed0", "slow"))
    bench = loaded.bench
    root = bench.study.workspace.root
    slow = {spec.name: recipes.recipe_for(replace(RECIPE, num_steps=2), "slow") for spec in SPECS}
    with Progress(disable=True) as progress:
        train_on(bench.study.parts, slow, recipes.workspace_of(root, "slow"), tiny_folders["gemma3"], progress)
    rows = pa.concat_tables(list(recipes.all_rows(bench, encoder, root, 2))).to_pandas()
    assert set(rows["run"]) == {f"{kind}_{name}" for kind in ("seed0", "slow") for name in METHODS}
    scores = rows.groupby("run")["score"].mean()
    assert scores["seed0_perfect"] == 1.0 > scores["slow_perfect"]


def test_the_sentence_has_the_losses_of_each_training(tmp_path: Path) -> None:
    assert "not measured yet" in recipes.sentence(tmp_path)
    scores = {f"{kind}_{name}": 1.0 for kind in recipes.KINDS for name in ("perfect", "selection_iid")}
    scores |= dict.fromkeys([f"{seed}_mixture_iid" for seed in recipes.SEEDS], 0.25) | {"scales_mixture_iid": 0.5}
    scores |= {"slow_perfect": 0.75, "slow_mixture_iid": 0.875}
    rows = [{"run": run, "task": task, "number": 0, "score": score} for run, score in scores.items() for task in "abc"]
    pd.DataFrame(rows).to_parquet(tmp_path / recipes.ROWS)
    found = recipes.sentence(tmp_path)
    assert "On 3 tasks the mixture changes right answers by -75.0 (-75.0 to -75.0) points" in found
    assert "by -50.0 (-50.0 to -50.0) if every second step" in found
    assert "own adapters have 75.0 % in place of 100.0, and the mixture changes right answers by -12.5 (" in found
    assert found.endswith("smaller than with the first seed by 62.5 (62.5 to 62.5) points.")


def test_the_interval_over_seeds_resamples_seeds() -> None:
    """Seeds agree on task a and differ on task b."""
    shares = {"seed0": (1.0, 0.0), "seed1": (1.0, 1.0), "seed2": (1.0, 1.0), "scales": (1.0, 0.0), "slow": (0.0, 0.0)}
    rows = [
        {"run": f"{kind}_{name}", "task": task, "number": number, "score": share if name == "mixture_iid" else 0.0}
        for kind, pair in shares.items()
        for name in METHODS
        for task, share in zip("ab", pair, strict=True)
        for number in range(3)
    ]
    frame = pd.DataFrame(rows)
    expected = bootstrap(np.array([[[1.0] * 3, [s[1]] * 3] for s in list(shares.values())[:3]]), resamples_tasks=True)
    assert recipes.over_seeds(Answers(frame, {}), "mixture_iid", "selection_iid") == expected.in_percent()
    text = recipes.section(frame)
    assert f"| mixture iid − selection iid | {expected.in_percent()} |" in text and "| 50.0 (" in text
