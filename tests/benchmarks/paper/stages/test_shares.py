"""The reference without training, among the encoders by share."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.tasks import Parts
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.retrieval.study import main_draws
from benchmarks.paper.stages import shares
from benchmarks.paper.stages.claims import Results
from benchmarks.paper.stages.shares import projected
from benchmarks.training.bigbench_tasks import Item
from retriever_svc import Encoder
from tests.benchmarks.tiny_study import SPECS
from tests.tiny_encoder import save_tiny_encoder, topic_texts

NAMES = [f"topic{number:02}_" for number in range(20)]


def test_the_projection_is_fitted_to_the_samples_of_the_pool_alone(tmp_path: Path) -> None:
    encoder = Encoder(save_tiny_encoder(tmp_path / "tiny", NAMES))
    samples, others = (topic_texts(12, seed=seed, topics=NAMES) for seed in (0, 1))

    def study(others: dict[str, list[str]]) -> Study:
        parts = {
            name: Parts(*[tuple(Item(text, ("",)) for text in own[name]) for own in (others, samples, others, others)])
            for name in NAMES
        }
        return Study(Workspace(tmp_path), dict.fromkeys(NAMES, SPECS[0]), parts, None)

    found = projected(encoder, study(others))
    assert found.projection is not None and found.identity.startswith(encoder.identity)
    assert found.identity == projected(encoder, study(samples)).identity != encoder.identity


def test_training_is_compared_with_the_projection_on_seen_and_unseen_tasks_apart(tmp_path: Path) -> None:
    """The trained encoder answers every question of its training's tasks and none of the others, the projection all."""
    names, seen = read_pool(), main_draws(read_pool())[0].tasks
    right = {
        shares.UNTRAINED_LABEL: dict.fromkeys(names, 0.0),
        shares.PROJECTED: dict.fromkeys(names, 1.0),
        "40%": {name: float(name in seen) for name in names},
    }
    rows = [
        {"run": f"{label} {strategy}_iid", "task": name, "number": number, "score": score}
        for label, of_tasks in right.items()
        for strategy in ("selection", "mixture")
        for name, score in of_tasks.items()
        for number in range(2)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / shares.ROWS)
    answers = Results(tmp_path).answers(shares.ROWS)
    gains = [shares.gain_over_projection(answers, "selection", seen=seen).mean for seen in (True, False)]
    assert gains == [0.0, -1.0]
    text = shares.sentence(tmp_path)
    assert "adds 100.0 (100.0 to 100.0) points to the right answers of selection, the training 39.1 (" in text
    assert "by 0.0 (0.0 to 0.0) points on the 18 tasks" in text and "by -100.0 (-100.0 to -100.0) on the others" in text
