"""The measurement of hard negatives, on made-up tasks with a tiny encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.retrieval import experiments as experiments_module
from benchmarks.paper.retrieval.experiments import Experiments
from benchmarks.paper.retrieval.hardness import KIND, chosen, gain, hardness_steps, section
from benchmarks.paper.retrieval.study import Study, Task
from retriever_svc import Encoder
from retriever_svc.training import TrainingSettings
from tests.tiny_encoder import save_tiny_encoder, topic_texts

NAMES = [f"topic{number:02}_" for number in range(5)]


def test_each_strength_has_an_encoder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [topic_texts(3, seed=seed, topics=NAMES) for seed in range(4)]
    tasks = tuple(Task(name, "cluster", *[tuple(part[name]) for part in parts]) for name in NAMES)
    model = save_tiny_encoder(tmp_path / "tiny", NAMES)
    seen: list[float] = []

    def train(texts: object, target: Path, *, settings: TrainingSettings, **_: object) -> None:
        shutil.copytree(model, target)
        (target / "training.json").write_text(f"{settings.hardness}")
        seen.append(settings.hardness)

    monkeypatch.setattr(experiments_module, "train_encoder", train)
    experiments = Experiments(Study(tasks, (), (0.4,), (0,)), Workspace(tmp_path), model)
    steps = hardness_steps(experiments)
    assert [step.name for step in steps] == [f"hardness {strength} share40-seed0" for strength in (0, 2, 8)]
    found = [pq.read_table(_written(step.path, step.run())).to_pandas() for step in steps]
    assert [set(rows["strength"]) for rows in found] == [{0.0}, {2.0}, {8.0}]
    assert all(len(rows) == 2 * len(NAMES) * 3 for rows in found)
    assert seen == [0.0, 2.0, 8.0]
    names = ("share40-seed0", "share40-seed0-hard2", "share40-seed0-hard8")
    assert len({experiments.encoder(name).identity for name in names} | {Encoder(model).identity}) == 4


def _written(path: Path, table: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_the_strength_is_chosen_on_choice_and_judged_on_test(tmp_path: Path) -> None:
    """Strength 2 is best on `choice`; on `test` it finds one more of four, and strength 8 finds all."""
    first = {(0.0, "choice"): 1, (2.0, "choice"): 3, (8.0, "choice"): 2}
    first |= {(0.0, "test"): 1, (2.0, "test"): 2, (8.0, "test"): 4}
    rows = pd.DataFrame(
        [
            {"encoder": "share40-seed0", "strength": strength, "part": part, "task": task, "query": query}
            | {"own": 1 if query < count else 2}
            for (strength, part), count in first.items()
            for task in ("a", "b")
            for query in range(4)
        ]
    )
    assert chosen(rows) == 2.0
    assert gain(rows).mean == pytest.approx(0.25)
    rows.to_parquet(tmp_path / f"retrieval_{KIND}.parquet")
    assert "The best on `choice`, 2, differs from the plain training by 25.0" in section(tmp_path)
