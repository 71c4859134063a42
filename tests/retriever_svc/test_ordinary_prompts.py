from __future__ import annotations

import hashlib
from importlib.resources import files

import numpy as np
import pytest

from retriever_svc.encoder import unit_rows
from retriever_svc.ordinary_prompts import OrdinaryVectors, ordinary_prompts, prompts_digest

DIM = 8


def test_the_packaged_prompts_differ_and_are_not_empty() -> None:
    prompts = ordinary_prompts()
    assert len(set(prompts)) == len(prompts) == 489
    assert all(prompt.strip() for prompt in prompts)


def test_the_digest_is_that_of_the_packaged_file() -> None:
    data = files("retriever_svc").joinpath("data/ordinary_prompts.jsonl").read_bytes()
    assert prompts_digest() == hashlib.sha256(data).hexdigest()


def rows_of(count: int, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32) + np.eye(DIM)[0])


def slow_nearness(text: np.ndarray, prompts: list[np.ndarray]) -> float:
    return sum(sorted((float(text @ prompt) for prompt in prompts), reverse=True)[:3]) / 3


def test_the_nearness_equals_a_slow_loop() -> None:
    prompts, queries = rows_of(30).astype(np.float32), rows_of(20, seed=1).astype(np.float32)
    found = OrdinaryVectors.of(prompts)
    for query, nearness in zip(queries, found.nearness(queries), strict=True):
        assert nearness == pytest.approx(slow_nearness(query, [*prompts]), abs=1e-5)
    others = [[row for other, row in enumerate(prompts) if other != number] for number in range(30)]
    usual = [slow_nearness(row, rest) for row, rest in zip(prompts, others, strict=True)]
    assert found.spread == pytest.approx(np.std(usual), abs=1e-5)


def test_the_nearness_of_a_query_does_not_depend_on_its_batch() -> None:
    ordinary, queries = OrdinaryVectors.of(rows_of(50).astype(np.float32)), rows_of(9, seed=2).astype(np.float32)
    alone = [ordinary.nearness(queries[n : n + 1])[0] for n in range(9)]
    np.testing.assert_array_equal(ordinary.nearness(queries), alone)


def test_nothing_is_near_to_very_few_ordinary_prompts() -> None:
    queries = rows_of(4)
    np.testing.assert_array_equal(OrdinaryVectors.of(rows_of(3)).nearness(queries), np.full(4, -1.0))
    assert OrdinaryVectors.of(np.tile(rows_of(1), (5, 1))).spread > 0


def test_nearness_does_not_count_without_a_projection() -> None:
    assert OrdinaryVectors.of(rows_of(30), is_projected=False).spread == np.inf
    assert OrdinaryVectors.of(rows_of(30)).spread < 1
