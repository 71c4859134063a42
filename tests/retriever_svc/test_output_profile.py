from __future__ import annotations

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.records import OutputProfile
from retriever_svc.output_profile import (
    MAX_LABELS,
    MIN_OUTPUTS,
    NEAR_OUTPUTS,
    functions_agree,
    label_set,
    make_profile,
    texts_to_encode,
)

NONE = np.empty((0, 3), np.float32)


def samples(*outputs: str | None) -> list[Sample]:
    return [Sample(f"input {number}", output) for number, output in enumerate(outputs)]


def text_profile(*vector: float) -> OutputProfile | None:
    rows = np.asarray([vector] * MIN_OUTPUTS, np.float32)
    return make_profile(samples(*(f"a sentence {number}" for number in range(MIN_OUTPUTS))), rows)


def test_labels_are_compared_without_case_space_and_full_stop() -> None:
    assert label_set(["Yes.", "no", " yes", "No", "YES", "no."]) == ("no", "yes")


@pytest.mark.parametrize(
    "outputs",
    [
        ["a", "b", "c", "d", "e"],
        ["yes", "yes", "no", "no", "maybe"],
        [f"label {number % (MAX_LABELS + 1)}" for number in range(4 * MAX_LABELS)],
        ["x" * 65, "y"] * 5,
    ],
    ids=["all differ", "too rare", "too many", "too long"],
)
def test_outputs_that_are_not_a_small_repeated_set_are_free_text(outputs: list[str]) -> None:
    assert label_set(outputs) == ()
    assert texts_to_encode(samples(*outputs)) == outputs


def test_too_few_outputs_give_no_profile_and_a_label_set_needs_no_vector() -> None:
    few = samples(*["yes"] * (MIN_OUTPUTS - 1), None, "  ")
    assert texts_to_encode(few) == []
    assert make_profile(few, NONE) is None
    labelled = samples("yes", "no", "yes", "no")
    assert texts_to_encode(labelled) == []
    profile = make_profile(labelled, NONE)
    assert profile is not None
    assert (profile.labels, profile.vector) == (("no", "yes"), None)


def test_free_text_keeps_the_direction_of_its_mean_vector_in_one_byte_per_number() -> None:
    outputs = samples(*(f"a sentence {number}" for number in range(MIN_OUTPUTS)))
    rows = np.random.default_rng(1).normal(size=(MIN_OUTPUTS, 384)).astype(np.float32)
    profile = make_profile(outputs, rows)
    assert profile is not None and profile.vector is not None
    assert (profile.labels, profile.vector.dtype, profile.vector.nbytes) == ((), np.int8, 384)
    mean, kept = rows.mean(axis=0), profile.vector.astype(np.float64)
    assert mean @ kept / np.linalg.norm(mean) / np.linalg.norm(kept) > 0.9999


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        (("no", "yes"), ("no", "yes"), True),
        (("no", "yes"), ("maybe", "no", "yes"), True),
        (("a", "b"), ("b", "c"), False),
        (("no", "yes"), ("high", "low"), False),
    ],
)
def test_label_sets_agree_if_half_of_all_labels_are_common(
    first: tuple[str, ...], second: tuple[str, ...], agree: bool
) -> None:
    assert functions_agree(OutputProfile(first), OutputProfile(second)) is agree
    assert functions_agree(OutputProfile(second), OutputProfile(first)) is agree


@pytest.mark.parametrize("cosine", [NEAR_OUTPUTS - 0.01, NEAR_OUTPUTS + 0.01])
def test_free_text_agrees_if_the_mean_outputs_are_near(cosine: float) -> None:
    near = text_profile(cosine, (1 - cosine**2) ** 0.5, 0)
    assert functions_agree(text_profile(1, 0, 0), near) is (cosine > NEAR_OUTPUTS)


def test_nothing_agrees_with_an_unknown_function_or_one_of_another_kind() -> None:
    labels, text, zero = OutputProfile(("no", "yes")), text_profile(1, 0, 0), text_profile(0, 0, 0)
    for first, second in ((None, labels), (text, None), (None, None), (labels, text), (text_profile(1, 0), text)):
        assert not functions_agree(first, second)
    assert not functions_agree(zero, zero)
