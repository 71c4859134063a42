"""A plan written as a path and read again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.vllm.fusions import split_name, with_fusion
from gpu_worker.vllm.plan_path import PlanIds, is_plan_path, make_path, parse_path
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, MAX_ABS_WEIGHT, Plan, PlannedAdapter, Strategy

WEIGHTS = st.floats(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT, allow_nan=False).filter(lambda weight: weight != 0)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


def plan(strategy: Strategy, members: dict[str, float], name: str = "poet") -> Plan:
    adapters = [PlannedAdapter(AdapterRef("local", name, "v"), digest, weight) for digest, weight in members.items()]
    return Plan(strategy, tuple(adapters))


@given(st.dictionaries(DIGESTS, WEIGHTS, min_size=1, max_size=5))
def test_a_path_holds_every_digest_and_the_exact_weight(members: dict[str, float]) -> None:
    path = make_path(plan("mixture", members))
    assert path is not None and is_plan_path(path)
    found = parse_path(path)
    assert found.strategy == "mixture"
    assert {adapter.weights_digest: adapter.weight for adapter in found.adapters} == members


def test_equal_compositions_have_equal_paths() -> None:
    known = make_path(plan("mixture", {"a": 0.5, "b": 0.25}))
    assert make_path(plan("mixture", {"b": 0.25, "a": 0.5}, name="another")) == known
    assert make_path(plan("mixture", {"b": 0.25, "c": 0.0, "a": 0.5})) == known
    assert make_path(plan("selection", {"a": 0.5})) == make_path(plan("mixture", {"a": 0.5}))


@pytest.mark.parametrize(
    "other",
    [
        with_fusion(plan("fusion", {"a": 0.5, "b": 0.25})),
        plan("mixture", {"a": 0.5, "b": 0.25000000000000006}),
        plan("mixture", {"a": 0.5, "c": 0.25}),
        plan("mixture", {"a": 0.5}),
    ],
)
def test_other_compositions_have_other_paths(other: Plan) -> None:
    assert make_path(other) != make_path(plan("mixture", {"a": 0.5, "b": 0.25}))


def test_a_path_names_a_fusion_as_one_adapter() -> None:
    path = make_path(with_fusion(plan("fusion", {"a": 0.5, "b": -0.25})))
    assert path is not None
    [adapter] = parse_path(path).adapters
    assert (adapter.weight, split_name(adapter.weights_digest)) == (1.0, (("a", 0.5), ("b", -0.25)))


def test_a_plan_without_weight_is_the_base_model() -> None:
    assert make_path(BASE_PLAN) is None
    assert make_path(plan("mixture", {"a": 0.0})) is None
    assert not is_plan_path("/not/a/real/path")


def test_a_path_keeps_its_id_and_other_paths_have_others() -> None:
    ids = PlanIds()
    assert [ids("a"), ids("b"), ids("a"), ids("c"), ids("b")] == [1, 2, 1, 3, 2]


def test_the_path_that_was_not_used_for_the_longest_is_forgotten_and_its_id_is_not_used_again() -> None:
    ids = PlanIds(max_kept=2)
    assert [ids("a"), ids("b"), ids("a"), ids("c")] == [1, 2, 1, 3]
    assert ids("a") == 1
    assert ids("b") == 4
