from __future__ import annotations

from retriever_svc import (
    NoAdapterMatched,
    StaleIndex,
)


def test_messages_state_what_was_expected_and_given() -> None:
    assert str(NoAdapterMatched(0.25, 0.5)) == "no adapter matched: the best scores 0.250, below its threshold 0.500"
    assert str(StaleIndex(7, 5)) == "generation 7 is not served yet: this replica is at 5; retry later"
