from __future__ import annotations

import logging

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.errors import BlobCorrupted
from lora_store.records import AdapterRecord
from retriever_svc import calibrate_floor
from retriever_svc.calibration import NO_FLOOR, OwnScores, leave_one_out_scores
from retriever_svc.encoder import unit_rows
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of

TABLE = {"x": (1.0, 0.0), "y": (0.0, 1.0), "z": (0.6, 0.8)}


def slow_floor(groups: list[np.ndarray]) -> float:
    scores = []
    for group in groups:
        for left_out in range(len(group)):
            others = [group[i].astype(np.float64) for i in range(len(group)) if i != left_out]
            if others:
                mean = sum(others) / len(others)
                scores.append(float(group[left_out] @ mean / np.linalg.norm(mean)))
    return float(np.percentile(scores, 1))


@pytest.mark.parametrize("sizes", [[20] * 10, [1, 2, 200, 3, 1], [2]])
def test_floor_equals_a_slow_leave_one_out_loop(sizes: list[int]) -> None:
    rng = np.random.default_rng(len(sizes))
    groups = [unit_rows((rng.standard_normal(8) + rng.standard_normal((size, 8))).astype(np.float32)) for size in sizes]
    assert calibrate_floor(groups) == pytest.approx(slow_floor(groups), abs=1e-6)


@pytest.mark.parametrize("groups", [[], [np.ones((1, 4))], [np.empty((0, 4))]], ids=["none", "single", "empty"])
def test_without_two_samples_anywhere_there_is_no_floor(groups: list[np.ndarray]) -> None:
    assert calibrate_floor(groups) == NO_FLOOR


def test_one_percent_of_the_samples_fall_below_the_floor() -> None:
    rng = np.random.default_rng(0)
    groups = [unit_rows(rng.standard_normal((20, 8)).astype(np.float32)) for _ in range(50)]
    scores = np.concatenate([leave_one_out_scores(group) for group in groups])
    assert (scores < calibrate_floor(groups)).sum() == 10


def test_others_that_cancel_out_score_zero() -> None:
    np.testing.assert_array_equal(leave_one_out_scores(np.asarray([[1, 0], [0, 1], [0, -1]]))[0], 0)


def test_samples_of_a_known_version_are_read_and_embedded_once() -> None:
    read: list[str] = []

    def source(record: AdapterRecord) -> list[Sample]:
        read.append(record.ref.name)
        return [Sample("x"), Sample("z")]

    encoder, first, second = FakeEncoder(TABLE), record_of("first", (1, 0)), record_of("second", (0, 1))
    own = OwnScores(encoder, source)
    own.refresh([first])
    scores = own.refresh([first, second])
    assert read == ["first", "second"]
    assert len(encoder.batches) == 2
    np.testing.assert_allclose(scores[second.ref.digest], [0.6, 0.6], atol=1e-6)
    assert set(own.refresh([second])) == {second.ref.digest}


def test_unreadable_samples_are_logged_left_out_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    broken = {"bad"}

    def source(record: AdapterRecord) -> list[Sample]:
        if record.ref.name in broken:
            raise BlobCorrupted("a", "b")
        return [Sample("x"), Sample("y")]

    good, bad = record_of("good", (1, 0)), record_of("bad", (0, 1))
    own = OwnScores(FakeEncoder(TABLE), source)
    with caplog.at_level(logging.WARNING):
        assert set(own.refresh([good, bad])) == {good.ref.digest}
    assert "local/bad" in caplog.text
    broken.clear()
    assert set(own.refresh([good, bad])) == {good.ref.digest, bad.ref.digest}
