"""What changed between two generations of a catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress, count
from operator import is_not

from lora_store.persistent_map import PersistentMap
from lora_store.records import AdapterRecord
from lora_store.snapshot import Key

_BLOCK = 4096  # another thread may run after so many


def differences(
    old: Mapping[Key, AdapterRecord], new: Mapping[Key, AdapterRecord]
) -> tuple[list[Key], list[AdapterRecord]]:
    """(names whose record is gone or another by now, records that are new).

    A later generation keeps the earlier one's records, as objects and in their order. So the two are walked side by
    side, which costs a tenth of looking every name up; a name at another place counts as removed and as added. Two
    maps that share their memory are compared only where they differ.
    """
    if isinstance(old, PersistentMap) and isinstance(new, PersistentMap):
        keys = new.changed_since(old)
        if keys is not None:
            changed = [key for key in keys if old.get(key) is not new.get(key)]
            return [key for key in changed if key in old], [new[key] for key in changed if key in new]
    before, after = list(old.values()), list(new.values())
    gone: list[Key] = []
    came: list[AdapterRecord] = []
    i = j = 0
    while True:
        num_same = _num_same(before, i, after, j)
        i, j = i + num_same, j + num_same
        if i == len(before) or j == len(after):
            return [*gone, *map(_key, before[i:])], [*came, *after[j:]]
        is_replaced, is_new = _key(before[i]) == _key(after[j]), _key(after[j]) not in old
        if is_replaced or is_new:
            came.append(after[j])
            j += 1
        if is_replaced or not is_new:
            gone.append(_key(before[i]))
            i += 1


def _num_same(before: Sequence[AdapterRecord], i: int, after: Sequence[AdapterRecord], j: int) -> int:
    """How many records are the same objects from `before[i]` and `after[j]` on."""
    total = 0
    while True:
        ours, theirs = before[i + total : i + total + _BLOCK], after[j + total : j + total + _BLOCK]
        same = next(compress(count(), map(is_not, ours, theirs)), min(len(ours), len(theirs)))
        total += same
        if same < _BLOCK:
            return total


def _key(record: AdapterRecord) -> Key:
    return record.ref.tenant, record.ref.name
