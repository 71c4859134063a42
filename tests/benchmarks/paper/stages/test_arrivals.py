"""A pool that changes under a stream of requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.paper.retrieval.ranking import index_of, nearest
from benchmarks.paper.retrieval.study import Task
from benchmarks.paper.stages import arrivals
from benchmarks.paper.stages.arrivals import (
    Classifier,
    Epoch,
    IndexRouter,
    requests_until_back,
    section,
    steps_of,
    stream_of,
    stream_rows,
)
from retriever_svc import Encoder
from tests.tiny_encoder import save_tiny_encoder, topic_texts

NAMES = [f"topic{number:02}_" for number in range(12)]
SIZES = {"num_requests": 60, "num_changes": 2, "num_live": 6, "num_swapped": 3}


def tasks_of(names: list[str]) -> list[Task]:
    parts = [topic_texts(6, seed=seed, topics=names) for seed in range(4)]
    return [Task(name, "cluster", *[tuple(part[name]) for part in parts]) for name in names]


@pytest.fixture(scope="module")
def stream() -> list[Epoch]:
    return stream_of(tasks_of(NAMES), **SIZES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny", NAMES)


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    return Encoder(model)


def test_every_change_adds_as_many_tasks_as_it_removes_and_no_task_twice(stream: list[Epoch]) -> None:
    live = [{task.name for task in epoch.live} for epoch in stream]
    assert [len(names) for names in live] == [6, 6, 6]
    assert [len(epoch.requests) for epoch in stream] == [20, 20, 20]
    for before, epoch, now in zip(live[:-1], stream[1:], live[1:], strict=True):
        assert now - before == epoch.arrived and len(epoch.arrived) == 3
    assert not stream[1].arrived & (live[0] | stream[2].arrived)
    assert all({task for task, _ in epoch.requests} <= names for epoch, names in zip(stream, live, strict=True))


def test_an_updated_index_equals_a_new_one(stream: list[Epoch], encoder: Encoder) -> None:
    router = IndexRouter(encoder)
    for epoch in stream:
        router.follow(epoch.live)
        texts = [text for _, text in epoch.requests]
        fresh = index_of(encoder, {task.name: task.samples for task in epoch.live})
        assert router.route(texts) == [names[0] for names in nearest(fresh, encoder.encode(texts), 1)]


def test_a_classifier_learns_its_tasks_and_names_no_others(stream: list[Epoch], encoder: Encoder) -> None:
    router = Classifier(encoder, stream[0].live)
    samples = [(task.name, text) for task in stream[0].live for text in task.samples]
    named = router.route([text for _, text in samples])
    assert np.mean([name == task for name, (task, _) in zip(named, samples, strict=True)]) > 0.8
    router.follow(stream[2].live)
    assert set(router.route([text for _, text in stream[2].requests])) <= {task.name for task in stream[0].live}


class Fixed:
    """Names the tasks that it was created with."""

    def __init__(self, live: list[Task]) -> None:
        self.known = {task.name for task in live}

    def follow(self, live: list[Task]) -> None:
        pass

    def route(self, texts: list[str]) -> list[str]:
        return [name if (name := text.split("|")[0]) in self.known else "none" for text in texts]


def fixed_stream() -> list[Epoch]:
    tasks = [Task(name, "c", ("s",), (), (), (f"{name}|",)) for name in NAMES]
    return stream_of(tasks, **SIZES)


def test_a_router_that_is_not_trained_again_never_names_new_tasks() -> None:
    rows = stream_rows("fixed", fixed_stream(), Fixed, retrains=False).to_pandas()
    gone = {task.name for task in fixed_stream()[0].live}
    assert (rows["hit"] == rows["task"].isin(gone)).all() and not rows[rows["arrived"]]["hit"].any()
    assert (rows["lag"] == 0).all() and rows["position"].tolist() == list(range(60))


def test_a_trained_router_answers_after_its_training() -> None:
    rows = stream_rows("fixed", fixed_stream(), Fixed, retrains=True).to_pandas()
    assert set(rows[rows["epoch"] > 0]["lag"]) == {1}  # training took no time, so it answers the next request
    after = rows[(rows["position"] % 20 >= 1) | (rows["epoch"] == 0)]
    assert after["hit"].all()


def test_a_training_longer_than_an_epoch_answers_later_and_delays_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 10_000, 27))  # every training takes 27 s, that is 27 requests; an epoch has 20
    monkeypatch.setattr(arrivals.time, "perf_counter", lambda: float(next(clock)))
    tasks = [Task(f"{name}", "c", ("s",), (), (), (f"{name}|",)) for name in (f"t{n}" for n in range(24))]
    stream = stream_of(tasks, num_requests=100, num_changes=4, num_live=6, num_swapped=3)
    rows = stream_rows("fixed", stream, Fixed, retrains=True).to_pandas()
    assert rows.groupby("epoch")["lag"].max().tolist() == [0, 27, 34, 41, 48]
    starts = [0, 47, 74, 101, 128]  # for each epoch: the epoch whose router answers
    for position, (task, hit) in enumerate(zip(rows["task"], rows["hit"], strict=True)):
        serving = max(number for number, start in enumerate(starts) if start <= position)
        assert hit == (task in {live.name for live in stream[serving].live}), position


def test_requests_until_hits_are_back_are_counted_from_the_change() -> None:
    assert requests_until_back(np.concatenate([np.zeros(7), np.ones(43)]), 0.95, window=10) == 7
    assert requests_until_back(np.ones(50), 0.95, window=10) == 0
    assert requests_until_back(np.zeros(50), 0.95, window=10) is None


def test_recovery_is_measured_against_the_level_before_any_change() -> None:
    """A router that loses more at every change does not reach the level before the first change."""
    hit = np.repeat([1.0, 0.0, 0.0], 200)
    rows = pd.DataFrame({"router": "worse", "epoch": np.repeat([0, 1, 2], 200), "position": range(600), "lag": 0})
    found = arrivals.arrivals_table(rows.assign(hit=hit, arrived=False))
    assert found.rstrip().endswith("| never, never |")


def test_every_router_runs_through_the_stream_and_has_its_row(
    stream: list[Epoch], encoder: Encoder, tmp_path: Path
) -> None:
    trained: list[list[Task]] = []

    def train(live: list[Task]) -> Encoder:
        trained.append(live)
        return encoder

    steps = steps_of(stream, tmp_path, lambda: encoder, train)
    rows = pd.concat([step.run().to_pandas() for step in steps])
    live = [epoch.live for epoch in stream]
    assert trained == [live[0], *live]  # once, then for every epoch
    assert len(rows) == 5 * 60
    text = section(rows)
    assert all(f"| {step.name} | " in text for step in steps)
    untrained = rows[rows["router"] == "index, untrained encoder"]
    once = rows[rows["router"] == "classifier, trained once"]
    assert untrained[untrained["arrived"]]["hit"].any() and not once[once["arrived"]]["hit"].any()
