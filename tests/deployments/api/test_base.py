"""The shared parts of request bodies: null and unknown keys, bounds, and the options of `lora`."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from deployments.api.base import (
    MAX_ADAPTERS,
    AdapterChoice,
    ApiRequest,
    LoraOptions,
    MergedAdapters,
    PlanGiven,
    PlanRow,
    at_most,
    options_of_path,
)
from retriever_svc import PinnedAdapter

ROW: dict[str, Any] = {"name": "poet", "digest": "d" * 64, "weight": 0.5}


class Small(ApiRequest):
    """A body of two fields."""

    name: str = "default"
    count: int = 1


def test_a_key_that_is_null_counts_as_unset() -> None:
    assert Small.model_validate({"name": None, "count": 3, "unknown": None}) == Small(count=3)


@pytest.mark.parametrize(("key", "hint"), [("nmae", "did you mean 'name'"), ("zzz", "unknown field")])
def test_an_unknown_key_is_refused_with_the_near_one(key: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=hint) as caught:
        Small.model_validate({key: 1})
    [error] = caught.value.errors()
    assert (error["type"], error["ctx"]["param"]) == ("unknown_field", key)


def test_the_name_of_an_unknown_key_is_shown_in_part() -> None:
    with pytest.raises(ValidationError) as caught:
        Small.model_validate({"x" * 100_000: 1})
    assert len(caught.value.errors()[0]["ctx"]["param"]) == 200


@pytest.mark.parametrize("value", [[1, 2], {"a": 1, "b": 2}, "any text", 7])
def test_only_collections_are_counted(value: object) -> None:
    assert at_most(2)(value) is value
    if isinstance(value, list | dict):
        with pytest.raises(PydanticCustomError, match="holds 2 items, at most 1 are allowed"):
            at_most(1)(value)


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (AdapterChoice, {"name": ""}, "name"),
        (AdapterChoice, {"name": "poet", "weight": 4.1}, "weight"),
        (PlanRow, ROW | {"digest": "d" * 12}, "digest"),
        (PlanRow, ROW | {"score": 2.1}, "score"),
        (PlanGiven, {"strategy": "mixture", "adapters": [ROW] * (MAX_ADAPTERS + 1)}, "adapters"),
        (LoraOptions, {"k": MAX_ADAPTERS + 1}, "k"),
        (LoraOptions, {"adapters": []}, "adapters"),
        (LoraOptions, {"min_score": 1.1}, "min_score"),
        (LoraOptions, {"abstain": "sometimes"}, "'never', 'lenient', 'balanced' or 'strict'"),
        (LoraOptions, {"abstain": "never", "min_score": 0.5}, "cannot be combined; set one of them"),
        (LoraOptions, {"filter": {"tags": []}}, "filter"),
        (LoraOptions, {"strategy_options": {"kept_weight": "much"}}, "strategy_options"),
        (LoraOptions, {"strategy_options": dict.fromkeys(map(str, range(17)), "x")}, "holds 17 items, at most 16"),
        (LoraOptions, {"strategy": "base"}, "strategy"),
        (
            MergedAdapters,
            {"ids": ["a", "b"], "weights": [1.0]},
            "weights has 1 items and ids has 2; they must",
        ),
        (MergedAdapters, {"ids": ["a"], "merge_strategy": "ties"}, "other than 'linear'"),
        (MergedAdapters, {"ids": ["a"], "density": 0.5}, "density"),
    ],
)
def test_a_value_out_of_bounds_is_refused(model: type[BaseModel], body: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        model.model_validate(body)


def test_a_row_of_a_plan_pins_its_version() -> None:
    assert PlanRow.model_validate(ROW | {"score": 0.75}).pinned() == PinnedAdapter("poet", "d" * 64, 0.5, 0.75)


def test_options_know_which_of_them_need_retrieval_and_which_name_adapters() -> None:
    retrieved = LoraOptions.model_validate({"k": 2, "query": "bees", "strategy": "fusion"})
    assert (retrieved.of_retrieval, retrieved.names_adapters) == (["k", "query"], None)
    named = LoraOptions.model_validate({"adapters": [{"name": "poet"}]})
    assert (named.of_retrieval, named.names_adapters) == ([], "adapters")
    assert LoraOptions(plan=PlanGiven(strategy="base")).names_adapters == "plan"


@pytest.mark.parametrize(("weights", "expected"), [(None, [1.0, 1.0]), ([0.5, -1.0], [0.5, -1.0])])
def test_merged_adapters_are_a_fusion_of_named_ones(weights: list[float] | None, expected: list[float]) -> None:
    options = MergedAdapters(ids=["a", "b"], weights=weights).options(LoraOptions(explain=True))
    assert (options.strategy, options.explain) == ("fusion", True)
    assert [(choice.name, choice.weight) for choice in options.adapters or []] == list(zip("ab", expected, strict=True))


def test_a_path_is_one_adapter_and_null_is_the_base_model() -> None:
    one = options_of_path("acme/poet", LoraOptions())
    assert (one.strategy, [choice.name for choice in one.adapters or []]) == ("selection", ["acme/poet"])
    base = options_of_path(None, LoraOptions())
    assert base.plan is not None and (base.plan.strategy, base.plan.adapters) == ("base", [])


def test_a_plan_that_is_sent_back_may_leave_out_its_circumstances() -> None:
    plan = PlanGiven(strategy="mixture", adapters=[PlanRow(**ROW)])
    assert (plan.generation, plan.abstained, plan.candidates, plan.reason) == (0, False, [], None)
