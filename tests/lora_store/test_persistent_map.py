"""The map whose changed copies share memory, compared with a dict that is copied completely."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from lora_store.persistent_map import PersistentMap


def _check_equal(found: PersistentMap[int, int], wanted: dict[int, int]) -> None:
    assert list(found.items()) == list(wanted.items())  # also in the same order
    assert (list(found), list(found.values()), len(found)) == (list(wanted), list(wanted.values()), len(wanted))
    assert found == wanted


@pytest.mark.parametrize("count", [0, 1, 50, 3000])
@pytest.mark.parametrize("seed", range(2))
def test_any_changes_equal_those_of_a_copied_dict(count: int, seed: int) -> None:
    draw = random.Random(seed)
    plain = {number: number for number in range(count)}
    shared, seen = PersistentMap(plain), []
    for _ in range(40):
        seen.append((shared, dict(plain)))
        editor = shared.edit()
        for _ in range(draw.choice([1, 1, 3, 300])):
            key, value = draw.randrange(count + 20), draw.randrange(10**6)
            if draw.random() < 0.4:
                assert editor.pop(key, -1) == plain.pop(key, -1)
            else:
                editor[key] = plain[key] = value
            assert (editor.get(key), key in editor) == (plain.get(key), key in plain)
        assert (list(editor), len(editor)) == (list(plain), len(plain))
        shared = editor.freeze()
        _check_equal(shared, plain)
    for older, wanted in seen:  # edits do not change older maps
        _check_equal(older, wanted)


def test_a_missing_key_is_an_error_or_the_default() -> None:
    editor = PersistentMap({"a": 1, "b": 2}).edit()
    editor.pop("a")
    for mapping in (editor, editor.freeze()):
        with pytest.raises(KeyError):
            mapping["a"]
        assert (mapping.get("a"), mapping.get("a", 7), "a" in mapping, mapping["b"]) == (None, 7, False, 2)


@pytest.mark.parametrize("seed", range(2))
def test_possibly_changed_keys_include_all_changed_ones(seed: int) -> None:
    draw = random.Random(seed)
    older = newer = PersistentMap({number: number for number in range(500)})
    for _ in range(20):
        editor = newer.edit()
        key = draw.randrange(520)
        if draw.random() < 0.5:
            editor.pop(key)
        else:
            editor[key] = -key
        newer = editor.freeze()
        keys = newer.changed_since(older)
        assert keys is not None
        assert {key for key in range(520) if older.get(key) != newer.get(key)} <= set(keys)
    assert PersistentMap(dict(older)).changed_since(older) is None


def test_one_change_copies_a_small_part_and_many_changes_stay_small_on_average() -> None:
    shared = PersistentMap({number: number for number in range(100_000)})
    peaks = []
    for number in range(1000):
        tracemalloc.start()
        editor = shared.edit()
        editor[100_000 + number] = number
        shared = editor.freeze()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sorted(peaks)[int(0.99 * len(peaks))] < 100_000  # bytes; the whole dict has five million
    assert len(shared) == 101_000
