"""The claims beyond the paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.retrieval.study import UNTRAINED, main_draws
from benchmarks.paper.stages import companions, flan_pool
from benchmarks.paper.stages.answer_tables import BASELINES, ROWS
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


def write(path: Path, scores: dict[str, tuple[float, ...]]) -> None:
    """Write a file of runs with the score of each task on its only question."""
    rows = [
        {"run": run, "task": str(task), "number": 0, "score": score}
        for run, of_tasks in scores.items()
        for task, score in enumerate(of_tasks)
    ]
    pd.DataFrame(rows).to_parquet(path)


def why(results: Results, *words: str) -> str:
    [found] = [claim.why for claim in BEYOND if all(word in claim.text for word in words)]
    assert callable(found)
    return found(results)


def test_the_costs_of_near_and_random_companions_are_named(tmp_path: Path) -> None:
    write(tmp_path / companions.ROWS, {"own": (1.0, 1.0), "nearest_1": (0.5, 1.0), "random_1": (0.0, 1.0)})
    assert "the nearest cost 25.0 points, random ones 50.0;" in why(Results(tmp_path), "Random companions")


def test_a_flan_like_pool_is_explained_by_its_rows(tmp_path: Path) -> None:
    runs = {"mixture_ood": (1.0, 1.0, 1.0, 0.0), "majority": (0.5, 0.5, 0.5, 0.5), "auto_ood": (0.0, 0.5, 1.0, 1.0)}
    write(tmp_path / flan_pool.ROWS, runs)
    results = Results(tmp_path)
    assert "The mixture has 25.0 (" in why(results, "share their labels", "better than selection")
    found = why(results, "share their labels", "`auto`")
    assert found.endswith("Equal weights are better on 2 of the 3 tasks that differ.")


def test_the_farthest_companions_are_compared_with_the_same_weight_alone(tmp_path: Path) -> None:
    write(tmp_path / companions.ROWS, {"own_third": (1.0, 1.0), "nearest_1": (0.0, 0.0), "farthest_1": (0.5, 0.5)})
    found = why(Results(tmp_path), "farthest")
    assert "by -50.0 (-50.0 to -50.0) points, the nearest by -100.0 (-100.0 to -100.0)." in found


def test_the_loss_where_labels_are_shared_is_compared_with_that_of_other_tasks(tmp_path: Path) -> None:
    write(tmp_path / flan_pool.ROWS, {"mixture_iid": (1.0, 1.0), "selection_iid": (0.75, 0.75)})
    scores = {"mixture_iid": 0.25, "selection_iid": 0.75}
    rows = [
        {"run": run, "task": task, "number": 0, "score": 0.75 if task.startswith("senti_") else score}
        for run, score in scores.items()
        for task in ("senti_a", "senti_b", "plural", "past")
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / ROWS)
    pd.DataFrame(rows[:0]).to_parquet(tmp_path / BASELINES)
    results = Results(tmp_path)
    found = {claim.text: claim.difference(results).mean for claim in BEYOND if "loses less" in claim.text}
    assert list(found.values()) == [0.25 + 0.25, 0.5]
