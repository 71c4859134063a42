from __future__ import annotations

import hashlib
import json
from importlib.resources import files

import numpy as np
import pytest

from retriever_svc import Encoder, ProjectionFiles
from retriever_svc.encoder import unit_rows
from retriever_svc.ordinary_prompts import (
    follow_ups,
    nearness,
    nearness_to_others,
    ordinary_prompts,
    prompts_digest,
    refers_back,
)
from tests.shared_encoders import shared_encoder

DIM = 8


@pytest.fixture(scope="module")
def projected() -> Encoder:
    encoder = shared_encoder()
    return encoder.projected(ProjectionFiles().shipped(encoder.identity))


def rows_of(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32) + np.eye(DIM)[0]
    return unit_rows(rows).astype(np.float32)


def slow_nearness(text: np.ndarray, prompts: list[np.ndarray]) -> float:
    nearest = sorted(prompts, key=lambda prompt: float(text @ prompt), reverse=True)[:3]
    mean = np.mean(nearest, axis=0)
    return float(text @ mean / np.linalg.norm(mean))


def test_the_packaged_prompts_differ_and_are_not_empty() -> None:
    prompts = ordinary_prompts()
    assert len(set(prompts)) == len(prompts) == 535
    assert all(prompt.strip() for prompt in prompts)
    data = files("retriever_svc").joinpath("data/ordinary_prompts.jsonl").read_bytes()
    assert prompts_digest() == hashlib.sha256(data).hexdigest()
    kinds = [json.loads(line)["kind"] for line in data.decode().splitlines()]
    assert follow_ups().tolist() == [kind == "follow-up" for kind in kinds]
    assert follow_ups().sum() == 56
    assert not refers_back(rows_of(1)[0], rows_of(30)), "other prompts recognise no turn"


def test_the_nearness_equals_a_slow_loop_in_any_batch() -> None:
    prompts, queries = rows_of(30), rows_of(20, seed=1)
    for query, found in zip(queries, nearness(queries, prompts), strict=True):
        assert found == pytest.approx(slow_nearness(query, [*prompts]), abs=1e-5)
    alone = [nearness(queries[n : n + 1], prompts)[0] for n in range(20)]
    np.testing.assert_array_equal(nearness(queries, prompts), alone)
    np.testing.assert_array_equal(nearness(rows_of(4), rows_of(3)), np.full(4, -1.0), "too few to be near to")


def test_a_mean_of_ordinary_prompts_is_no_nearer_than_its_own_members_allow() -> None:
    prompts = rows_of(60)
    for start in range(0, 60, 3):
        mean = unit_rows(prompts[start : start + 3].mean(axis=0))
        near = nearness(prompts[start : start + 1], prompts)[0]
        assert prompts[start] @ mean <= near + 1e-6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("can you make that a little friendlier?", True),
        ("Bitte noch etwas förmlicher formulieren.", True),
        ("ahora más breve", True),
        ("帮我改得再正式一点", True),
        ("What is the capital of France?", False),
        ("Wie lange muss ein Ei kochen?", False),
        ("Classify the ticket: my invoice is wrong.", False),
    ],
)
def test_turns_that_refer_back_are_recognised_in_any_language(projected: Encoder, text: str, expected: bool) -> None:
    [query] = projected.encode([text])
    assert refers_back(query, ProjectionFiles().ordinary(projected)) is expected


def test_the_nearness_to_the_others_is_that_without_the_prompt_itself() -> None:
    ordinary = unit_rows(np.random.default_rng(5).normal(size=(20, 8)).astype(np.float32))
    slow = [nearness(ordinary[row : row + 1], np.delete(ordinary, row, axis=0))[0] for row in range(20)]
    assert nearness_to_others(ordinary) == pytest.approx(slow, abs=1e-6)
    assert nearness_to_others(ordinary[:3]).tolist() == [-1.0] * 3, "too few to compare with"
