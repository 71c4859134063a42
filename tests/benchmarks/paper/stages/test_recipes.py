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
