"""A cache bounded by the total size of its values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, KeysView
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def _one(value: object) -> int:
    return 1


class LruCache(Generic[Key, Value]):
    """The values used last, of at most `maxsize` in total. Not thread-safe: the caller holds a lock.

    `getsizeof` measures a value once, when it is put; by default every value counts 1. The total is kept up to date, so
    an eviction costs as much as it removes. With `keeps_newest` the value put last stays even if it alone is larger
    than `maxsize`; otherwise such a value is not kept and evicts nothing.
    """

    def __init__(self, maxsize: int, getsizeof: Callable[[Value], int] = _one, *, keeps_newest: bool = False) -> None:
        self.maxsize = maxsize
        self._getsizeof, self._keeps_newest = getsizeof, keeps_newest
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()  # least recently used first
        self._total = 0

    @property
    def total(self) -> int:
        """The size of all values."""
        return self._total

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def keys(self) -> KeysView[Key]:
        """Return the keys, least recently used first."""
        return self._entries.keys()

    def get(self, key: Key) -> Value | None:
        """Return the value and mark it as the most recently used, or return None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Key, value: Value) -> None:
        """Keep the value as the most recently used, in place of an older one; evict others to stay within `maxsize`."""
        self.pop(key)
        size = self._getsizeof(value)
        if size > self.maxsize and not self._keeps_newest:
            return
        self._entries[key] = value, size
        self._total += size
        while self._total > self.maxsize and len(self._entries) > 1:
            self.pop(next(iter(self._entries)))

    def pop(self, key: Key) -> Value | None:
        """Remove the value and return it, or return None."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._total -= entry[1]
        return entry[0]
