"""The measurement of projections and thresholds, on made-up tasks with a tiny encoder."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.retrieval.loading import pool_specs
from benchmarks.paper.retrieval.projected import (
    Others,
    Projections,
    others_of,
    projected_rows,
    read_everyday,
    unseen_gains,
)
from benchmarks.paper.retrieval.study import UNTRAINED, Task
from retriever_svc import Encoder
from retriever_svc.embedding import CORE_WEIGHT
from retriever_svc.ordinary_prompts import ordinary_prompts
from retriever_svc.shared_wording import without_shared_wording
from tests.tiny_encoder import save_tiny_encoder, topic_texts

NAMES = [f"topic{number:02}_" for number in range(22)]
NUM_POOL = 20
FOREIGN = {"choice": ["filler1 filler2", "unknown words"], "test": ["filler3 filler4 filler5"]}
EVERYDAY = ["good morning", "thanks"]


def tasks_of(names: list[str]) -> tuple[Task, ...]:
    parts = [topic_texts(count, seed=seed, topics=names) for seed, count in enumerate((12, 1, 2, 3))]
    return tuple(Task(name, "cluster", *[tuple(part[name]) for part in parts]) for name in names)


TASKS, SPARES = tasks_of(NAMES[:NUM_POOL]), tasks_of(NAMES)[NUM_POOL:]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny", NAMES))


@pytest.fixture(scope="module")
def rows(encoder: Encoder) -> pd.DataFrame:
    return projected_rows(encoder, UNTRAINED, TASKS, SPARES, Others(FOREIGN, EVERYDAY)).to_pandas()


def test_every_prompt_is_routed_under_every_projection(rows: pd.DataFrame) -> None:
    counts = rows.groupby(["projection", "kind", "part"]).size().to_dict()
    for projection in ("none", "refit"):
        assert counts[projection, "own", "choice"] == 2 * NUM_POOL
        assert counts[projection, "own", "test"] == 3 * NUM_POOL
        assert counts[projection, "wide", "test"] == 3 * len(NAMES)
        assert (counts[projection, "foreign", "choice"], counts[projection, "foreign", "test"]) == (2, 1)
        assert counts[projection, "everyday", "test"] == 2
    assert set(rows["projection"]) == {"none", "refit"}  # nothing is packaged for this encoder


def test_the_ranks_without_projection_equal_a_slow_loop(rows: pd.DataFrame, encoder: Encoder) -> None:
    means = {
        task.name: (1 - CORE_WEIGHT) * encoder.encode(task.samples).mean(axis=0).astype(float)
        + CORE_WEIGHT * encoder.encode(without_shared_wording(task.samples)).mean(axis=0).astype(float)
        for task in TASKS
    }
    units = {name: mean / np.linalg.norm(mean) for name, mean in means.items()}
    own = rows.query("projection == 'none' and kind == 'own' and part == 'test'").set_index(["task", "query"])
    for task in TASKS:
        for number, vector in enumerate(encoder.encode(task.test).astype(float)):
            order = sorted(units, key=lambda name: -(vector @ units[name]))
            place = order.index(task.name) + 1
            assert own.loc[(task.name, number)]["place"] == (place if place <= 3 else 0)


def test_shares_follow_from_the_confidences() -> None:
    table = pd.DataFrame(
        [
            {"encoder": "e", "projection": "none", "kind": kind, "part": "test", "task": "a", "query": query}
            | {"place": 1, "confidence": confidence, "abstained": confidence < 0.3}
            for kind, values in (("own", np.linspace(0, 1, 21)), ("foreign", [0.0, 0.04, 0.06, 0.9]))
            for query, confidence in enumerate(values)
        ]
    )
    found = Projections(table, "test")
    assert found.turned_away(["e"], "none", "foreign") == 0.5  # 5 % of the own prompts are below 0.05
    assert found.abstained(["e"], "none", "foreign") == 0.75
    assert found.auroc(["e"], "none", "foreign") == pytest.approx((20.5 + 20 + 19 + 2.5) / 84, abs=0.02)


def test_the_gain_counts_unseen_tasks_only() -> None:
    places = {"untrained": {"a": 2, "b": 2}, "trained": {"a": 1, "b": 2}}
    table = pd.DataFrame(
        [
            {"encoder": name, "projection": "none", "kind": "own", "part": "test", "task": task, "query": 0}
            | {"place": place, "confidence": 1.0, "abstained": False}
            for name, own in places.items()
            for task, place in own.items()
        ]
    )
    assert unseen_gains(table, {"trained": {"a"}})["none", "none"].mean == 0
    assert unseen_gains(table, {"trained": {"b"}})["none", "none"].mean == 1


def test_everyday_prompts_are_not_those_that_set_thresholds() -> None:
    held = read_everyday()
    assert len(set(held)) == len(held) >= 100
    assert not set(held) & set(ordinary_prompts())


def test_foreign_tasks_have_no_related_task_in_the_pool() -> None:
    listed = read_task_list()
    pool = tuple(Task(spec.name, spec.cluster, (), (), (), ()) for spec in pool_specs(listed))
    related, strange = (Task(name, "", (), (), (name,), (name,)) for name in ("senti_reviews", "fever"))
    assert others_of(listed, pool, [related, strange]).foreign["test"] == ["fever"]
