"""The claims beyond the paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.retrieval.study import UNTRAINED, main_draws
from benchmarks.paper.stages.claims import Results
from benchmarks.paper.stages.claims_beyond import BEYOND


def test_training_is_compared_with_the_projection_on_unseen_tasks_only(tmp_path: Path) -> None:
    """The trained encoder finds every unseen task and no seen one, the projection alone finds all."""
    names, [draw, *_] = read_pool(), main_draws(read_pool())
    places = {
        (UNTRAINED, "none"): dict.fromkeys(names, 2),
        (UNTRAINED, "refit"): dict.fromkeys(names, 1),
        (draw.name, "none"): {name: 2 if name in draw.tasks else 1 for name in names},
        (draw.name, "refit"): dict.fromkeys(names, 2),
    }
    rows = [
        {"encoder": encoder, "projection": projection, "kind": "own", "part": "test", "task": task, "query": 0}
        | {"place": place, "confidence": 1.0, "abstained": False}
        for (encoder, projection), own in places.items()
        for task, place in own.items()
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "retrieval_projections.parquet")
    results = Results(tmp_path)
    assert results.unseen_gains["none", "none"].mean == 1.0
    found = {claim.text: claim.difference(results).mean for claim in BEYOND if "has not seen" in claim.text}
    assert sorted(found.values()) == [-1.0, 0.0] and len(found) == 2
