from __future__ import annotations

from lora_store import Publish
from lora_store.catalogue import History
from lora_store.events import Fold, fold_table_of, table_of
from tests.lora_store.builders import MakeRecord


def test_events_count_until_a_fold_replaces_them(make_record: MakeRecord) -> None:
    history = History()
    history.add(table_of([Publish(make_record("a")), Publish(make_record("b"))], 1, "one"), after=0)
    history.add(table_of([Publish(make_record("c"))], 2, "two"), after=1)
    assert (history.num_events, history.commits) == (3, {"one": 1, "two": 2})
    history.add(fold_table_of([Fold(None, None)], 1, {"one": 1}), after=2)
    assert history.num_events == 1
    history.forget_until(2)
    assert (history.num_events, history.commits) == (0, {"one": 1, "two": 2})


def test_only_recent_commits_are_remembered(make_record: MakeRecord) -> None:
    history = History()
    for generation in range(1, 301):
        history.add(table_of([Publish(make_record())], generation, f"c{generation}"), after=generation - 1)
    assert list(history.commits.values()) == list(range(45, 301))
