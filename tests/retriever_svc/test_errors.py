from __future__ import annotations

import pickle

import pytest

from retriever_svc import (
    AdapterIncompatible,
    EncoderExists,
    EncoderUnusable,
    NoAdapterMatched,
    PlanGone,
    ProjectionUnusable,
    RetrieverError,
    RouteInvalid,
    StaleIndex,
    TooFewSamples,
    TrainingUnavailable,
    errors,
)

ERRORS = [
    EncoderUnusable("some/model", "no weights"),
    ProjectionUnusable("the projection is damaged"),
    AdapterIncompatible("poet", "org/old", "org/new"),
    RouteInvalid("top_k"),
    PlanGone("a", "d" * 64),
    TooFewSamples("none"),
    TrainingUnavailable(["accelerate", "datasets"]),
    EncoderExists("some/folder"),
    NoAdapterMatched(0.25, 0.5),
    NoAdapterMatched(None, -1.0),
    StaleIndex(7, 5),
]


def test_every_error_has_a_case() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RetrieverError)}
    assert {type(error) for error in ERRORS} == kinds - {RetrieverError}, "add an instance of the new class to ERRORS"


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_survive_pickling_between_replicas(error: RetrieverError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_messages_state_what_was_expected_and_given() -> None:
    assert str(NoAdapterMatched(0.25, 0.5)) == "no adapter matched: the best scores 0.250, below its threshold 0.500"
    assert str(StaleIndex(7, 5)) == "generation 7 is not served yet: this replica is at 5; retry later"
