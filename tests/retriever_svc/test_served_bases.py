"""Which adapters belong to the served base model."""

from __future__ import annotations

import pytest

from retriever_svc import ServedBases
from retriever_svc.errors import AdapterIncompatible
from tests.retriever_svc.pool_fakes import record_of

BASES = ServedBases({"chat-b": {"org/b", "chat-b"}})


@pytest.mark.parametrize(
    ("base_model", "is_served"), [("org/b", True), ("chat-b", True), ("org/a", False), ("b", False), ("", True)]
)
def test_an_adapter_is_served_if_it_names_an_accepted_base_or_none(base_model: str, is_served: bool) -> None:
    record = record_of("poet", None, base_model=base_model)
    assert BASES.serves(record) == is_served
    assert ServedBases().serves(record), "without accepted names every base is served"


def test_the_error_names_the_adapters_base_the_served_one_and_the_remedies() -> None:
    BASES.check(record_of("poet", None, base_model="org/b"), "poet")
    with pytest.raises(AdapterIncompatible) as caught:
        BASES.check(record_of("poet", None, base_model="org/a"), "acme/poet")
    assert str(caught.value) == (
        "adapter 'acme/poet' was made for the base model 'org/a', and this server serves 'chat-b': name another"
        " adapter, or start a server with base_model: org/a. If both names mean the same weights, let the operator add"
        " 'org/a' to the setting accepts_base"
    )


def test_adapters_that_are_not_served_are_counted_by_their_base() -> None:
    of = {"a1": "org/a", "a2": "org/a", "b": "org/b", "c": "org/c"}
    records = [record_of(name, None, base_model=base_model) for name, base_model in of.items()]
    assert BASES.unserved(records) == (("org/a", 2), ("org/c", 1))
    assert ServedBases().unserved(records) == ()


def test_an_adapter_belongs_to_the_base_that_accepts_its_name_or_to_the_first() -> None:
    several = ServedBases({"chat-b": {"org/b"}, "chat-a": {"org/a"}})
    assert [several.find(name) for name in ("org/a", "org/b", "", "org/c")] == ["chat-a", "chat-b", "chat-b", None]
    with pytest.raises(AdapterIncompatible, match="this server serves 'chat-b, chat-a'"):
        several.check(record_of("poet", None, base_model="org/c"), "poet")
