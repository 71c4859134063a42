"""The keys of blocks: equal for equal tokens under an equal composition of one tenant, and never otherwise."""

from __future__ import annotations

import pytest

from gpu_worker.front.prefix import Prefix, make_namespace
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter, Strategy


def plan(strategy: Strategy, *members: tuple[str, float], name: str = "a", score: float | None = None) -> Plan:
    """Return a plan of adapters, given as (weights digest, weight)."""
    adapters = [PlannedAdapter(AdapterRef("t", name, digest), digest, weight, score) for digest, weight in members]
    return Plan(strategy, tuple(adapters))


def namespace(of: Plan, tenant: str = "acme", *, shares_base: bool = False) -> bytes:
    return make_namespace(of, tenant, shares_base=shares_base)


MIXED = plan("mixture", ("aa", 0.5), ("bb", 0.25))


@pytest.mark.parametrize(
    "other",
    [
        BASE_PLAN,
        plan("fusion", ("aa", 0.5), ("bb", 0.25)),
        plan("mixture", ("aa", 0.25), ("bb", 0.5)),
        plan("mixture", ("aa", 0.5), ("bb", 0.2500001)),
        plan("mixture", ("aa", -0.5), ("bb", 0.25)),
        plan("mixture", ("aa", 0.5)),
        plan("mixture", ("aa", 0.5), ("bc", 0.25)),
        plan("mixture", ("aa", 0.5), ("bb", 0.25), ("cc", 0.1)),
        plan("selection", ("aabb", 0.5)),
    ],
    ids=str,
)
def test_another_composition_has_another_namespace(other: Plan) -> None:
    assert namespace(other) != namespace(MIXED)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (MIXED, plan("mixture", ("bb", 0.25), ("aa", 0.5))),
        (MIXED, plan("mixture", ("aa", 0.5), ("bb", 0.25), name="renamed", score=0.9)),
        (MIXED, plan("mixture", ("aa", 0.5), ("bb", 0.25), ("cc", 0.0))),
        (plan("selection", ("aa", 1.0)), plan("mixture", ("aa", 1.0))),
        (BASE_PLAN, plan("fusion", ("aa", 0.0))),
    ],
    ids=["order", "names and scores", "a weight of zero", "one adapter", "no adapter"],
)
def test_equal_compositions_have_one_namespace(one: Plan, other: Plan) -> None:
    assert namespace(one) == namespace(other)


def test_tenants_share_the_base_only_if_the_operator_says_so() -> None:
    for of in (BASE_PLAN, MIXED):
        assert namespace(of, "acme") != namespace(of, "globex")
    assert namespace(BASE_PLAN, "acme", shares_base=True) == namespace(BASE_PLAN, "globex", shares_base=True)
    assert namespace(MIXED, "acme", shares_base=True) != namespace(MIXED, "globex", shares_base=True)
    assert namespace(BASE_PLAN, "acme", shares_base=True) != namespace(BASE_PLAN, "acme")


def keys(tokens: list[int], of: bytes = b"n", block_tokens: int = 2) -> list[bytes]:
    prefix = Prefix(tokens, of, (), block_tokens)
    return [prefix.key(block) for block in range(len(tokens) // block_tokens)]


def test_a_key_depends_on_every_token_before_it() -> None:
    tokens = [5, 6, 7, 8, 9, 10]
    for changed in range(6):
        other = [*tokens[:changed], 99, *tokens[changed + 1 :]]
        is_equal = [one == another for one, another in zip(keys(tokens), keys(other), strict=True)]
        assert is_equal == [block < changed // 2 for block in range(3)]
    assert keys(tokens) == keys([*tokens, 11])
    assert not set(keys(tokens)) & set(keys(tokens, b"m"))
    assert len(set(keys([5, 6, 5, 6]))) == 2, "equal blocks at other places differ"


def test_ids_are_not_run_together() -> None:
    assert keys([1, 0x0101_0000]) != keys([0x0001_0101, 0])
    assert keys([256, 0]) != keys([1, 0])


def test_keys_follow_the_rows_own_list_and_only_full_blocks_have_one() -> None:
    tokens = [5, 6, 7]
    prefix = Prefix(tokens, b"n", (), 2)
    first = prefix.key(0)
    with pytest.raises(AssertionError, match="full blocks"):
        prefix.key(1)
    tokens.append(8)
    assert [first, prefix.key(1)] == keys([5, 6, 7, 8])
