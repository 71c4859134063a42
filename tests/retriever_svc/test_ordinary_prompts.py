from __future__ import annotations

import hashlib
import json
from importlib.resources import files

import numpy as np
import pytest

from retriever_svc import Encoder, ProjectionFiles
from retriever_svc.encoder import unit_rows
from retriever_svc.ordinary_prompts import (
    bare_words,
    follow_ups,
    nearness,
    nearness_by_group,
    nearness_to_others,
    ordinary_prompts,
    prompts_digest,
    refers_back,
    split_bare_words,
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
    assert len(set(prompts)) == len(prompts) == 1133
    assert all(prompt.strip() for prompt in prompts)


def test_the_digest_is_that_of_the_packaged_file() -> None:
    data = files("retriever_svc").joinpath("data/ordinary_prompts.jsonl").read_bytes()
    assert prompts_digest() == hashlib.sha256(data).hexdigest()
    kinds = [json.loads(line)["kind"] for line in data.decode().splitlines()]
    assert follow_ups().tolist() == [kind == "follow-up" for kind in kinds]
    assert follow_ups().sum() == 61


def test_words_and_short_phrases_in_every_script_are_bare_words() -> None:
    prompts = ordinary_prompts()
    words = [text for text, is_word in zip(prompts, bare_words(len(prompts)), strict=True) if is_word]
    assert {"hello there", "weather", "good morning", "42", "спасибо", "谢谢", "ありがとう", "شكرا"} <= set(words)
    assert not {"Hi there friend", "Who discovered penicillin?", "Tell me a joke."} & set(words)
    assert 600 < len(words) < 700
    assert not bare_words(len(prompts) - 1).any(), "those of other prompts are unknown"


def test_ordinary_prompts_are_bare_words_or_not() -> None:
    num = len(ordinary_prompts())
    others, words = split_bare_words(num)
    assert (others ^ words).all() and words.tolist() == bare_words(num).tolist()
    assert [group.tolist() for group in split_bare_words(2)] == [[True, True]]
    assert split_bare_words(0) == []


def test_the_nearness_equals_a_slow_loop() -> None:
    prompts, queries = rows_of(30), rows_of(20, seed=1)
    for query, found in zip(queries, nearness(queries, prompts), strict=True):
        assert found == pytest.approx(slow_nearness(query, [*prompts]), abs=1e-5)


def test_the_nearness_of_a_query_does_not_depend_on_its_batch() -> None:
    ordinary, queries = rows_of(50), rows_of(9, seed=2)
    alone = [nearness(queries[n : n + 1], ordinary)[0] for n in range(9)]
    np.testing.assert_array_equal(nearness(queries, ordinary), alone)


def test_bare_words_and_other_prompts_are_compared_apart() -> None:
    rows, queries = rows_of(len(ordinary_prompts())), rows_of(6, seed=3)
    others, words = split_bare_words(len(rows))
    for query, near, *apart in zip(queries, nearness(queries, rows), *nearness_by_group(queries, rows), strict=True):
        slow = [slow_nearness(query, [*rows[group]]) for group in (others, words)]
        assert apart == pytest.approx(slow, abs=1e-5)
        assert near == pytest.approx(max(slow), abs=1e-5)
    found = nearness_to_others(rows)
    for place in (0, len(rows) - 1):
        rest = [[*rows[group & (np.arange(len(rows)) != place)]] for group in (others, words)]
        assert found[place] == pytest.approx(max(slow_nearness(rows[place], group) for group in rest), abs=1e-5)


def test_nothing_is_near_to_very_few_ordinary_prompts() -> None:
    np.testing.assert_array_equal(nearness(rows_of(4), rows_of(3)), np.full(4, -1.0))
    assert nearness_to_others(rows_of(3)).tolist() == [-1.0] * 3


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
def test_turns_that_mean_an_earlier_one_are_recognised_in_any_language(
    projected: Encoder, text: str, expected: bool
) -> None:
    [query] = projected.encode([text])
    assert refers_back(query, ProjectionFiles().ordinary(projected)) is expected


def test_other_prompts_than_the_packaged_ones_recognise_no_turn() -> None:
    assert not refers_back(rows_of(1)[0], rows_of(30))
