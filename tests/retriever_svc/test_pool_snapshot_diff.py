from __future__ import annotations

import random

import pytest

from lora_store.records import AdapterRecord
from lora_store.snapshot import Key
from retriever_svc.pool import diff_records
from tests.retriever_svc.pool_fakes import record_of

Records = dict[Key, AdapterRecord]


def pool(count: int) -> Records:
    return {("local", f"a{n}"): record_of(f"a{n}", None) for n in range(count)}


def applied(old: Records, gone: list[Key], came: list[AdapterRecord]) -> Records:
    assert len(set(gone)) == len(gone)
    assert len({record.ref for record in came}) == len(came)
    rest = {key: record for key, record in old.items() if key not in gone}
    assert all(("local", record.ref.name) not in rest for record in came)
    return rest | {("local", record.ref.name): record for record in came}


@pytest.mark.parametrize("count", [0, 1, 30, 9000])
@pytest.mark.parametrize("seed", range(8))
def test_any_changes_are_found_and_nothing_else(count: int, seed: int) -> None:
    rng, old = random.Random(seed), pool(count)
    new, changed = dict(old), set()
    for step in range(rng.randrange(12)):
        key = ("local", f"a{rng.randrange(count + 3)}")
        match rng.randrange(3):
            case 0:
                new.pop(key, None)
            case 1:
                new[key] = record_of(key[1], None, version=f"{step}")
            case _:  # withdrawn and published again, so it is at the end
                new.pop(key, None)
                new[key] = record_of(key[1], None, version=f"{step}")
        changed.add(key)
    gone, came = diff_records(old, new)
    assert applied(old, gone, came) == new
    assert {*gone, *(("local", record.ref.name) for record in came)} <= changed


def test_a_change_of_the_record_alone_is_found() -> None:
    old = pool(5)
    again = record_of("a2", None)  # an equal but different object, whose embedding may differ
    assert diff_records(old, old | {("local", "a2"): again}) == ([("local", "a2")], [again])


@pytest.mark.parametrize("count", [3, 5000])
def test_moved_records_count_as_removed_and_new(count: int) -> None:
    old = pool(count)
    new = dict(sorted(old.items(), key=lambda item: item[0], reverse=True))
    gone, came = diff_records(old, new)
    assert applied(old, gone, came) == new
    moved = dict([*list(old.items())[1:], next(iter(old.items()))])
    assert diff_records(old, moved) == ([("local", "a0")], [old["local", "a0"]])


def test_all_gone_and_all_new() -> None:
    old = pool(3)
    assert diff_records(old, {}) == (list(old), [])
    assert diff_records({}, old) == ([], list(old.values()))
