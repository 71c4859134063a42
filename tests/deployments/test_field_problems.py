from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deployments.field_problems import describe_problem, did_you_mean, field_names


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    strategy: Literal["mixture", "fusion"] = "mixture"
    count: int = Field(default=1, ge=1)
    cache_bytes: int = 0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    needed: str
    inner: Inner | None = None
    free: dict[str, int] = {}


@pytest.mark.parametrize(
    ("given", "known", "hint"),
    [
        ("explian", ["explain", "k"], "; did you mean 'explain'?"),
        ("max_batch", ["max_batch_size", "max_wait_s"], "; did you mean 'max_batch_size'?"),
        ("encoder", ["encoder_threads_of_one_replica", "k"], "; did you mean 'encoder_threads_of_one_replica'?"),
        ("zzz", ["explain", "k"], ""),
        ("", ["explain"], ""),
        ("explain", [], ""),
    ],
)
def test_the_nearest_known_name_is_suggested_or_none(given: str, known: list[str], hint: str) -> None:
    assert did_you_mean(given, known) == hint


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"needed": "x", "inner": {"stratgy": "fusion"}}, "unknown; did you mean 'strategy'?"),
        ({"needed": "x", "iner": {}}, "unknown; did you mean 'inner'?"),
        ({}, "is missing"),
        ({"needed": 3}, "must be a string, got 3"),
        ({"needed": "x", "inner": {"strategy": "mix"}}, "must be 'mixture' or 'fusion', got 'mix'"),
        ({"needed": "x", "inner": {"count": 0}}, "must be at least 1, got 0"),
        ({"needed": "x", "inner": {"count": None}}, "must be a whole number, got null"),
        ({"needed": "x", "inner": [1]}, "must be an object with named fields, got a list"),
        ({"needed": "x", "inner": {"strategy": "m" * 99}}, f"must be 'mixture' or 'fusion', got '{'m' * 59}…"),
    ],
)
def test_a_problem_says_what_is_allowed_and_what_was_given(data: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    [problem] = caught.value.errors()
    assert describe_problem(problem, field_names(Outer, problem["loc"])) == text


def test_half_of_a_surrogate_pair_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Annotated[str, Field(max_length=9)]).validate_python("\ud800")
    text = "must be valid Unicode: it has half of a surrogate pair, got '\\ud800'"
    assert describe_problem(caught.value.errors()[0]) == text


def test_a_value_that_may_be_a_secret_is_not_quoted() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"needed": 12345})
    assert describe_problem(caught.value.errors()[0], shows_value=False) == "must be a string"


def test_free_names_have_no_suggestions() -> None:
    assert field_names(Outer, ["free", "a"]) == []
    assert field_names(Outer, ["inner", "a"]) == ["strategy", "count", "cache_bytes"]
    assert field_names(Outer, ["nowhere", "a"]) == []


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("8GB", 8 * 10**9), ("8GiB", 8 << 30), ("8g", 8 << 30), ("1.5 MiB", 3 << 19), ("20kb", 20_000), ("1T", 1 << 40)],
)
def test_a_size_with_a_unit_is_converted_to_bytes(size: str, num_bytes: int) -> None:
    with pytest.raises(ValidationError) as caught:
        Inner.model_validate({"count": size, "cache_bytes": size})
    count, cache = caught.value.errors()
    assert describe_problem(cache) == f"must be a number of bytes: {size} is {num_bytes}"
    assert describe_problem(count) == f"must be a whole number, got {size!r}"
