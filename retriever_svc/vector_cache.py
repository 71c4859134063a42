"""A bounded cache of text vectors, apart for each owner, that keeps no text."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

OwnedText = tuple[str, str]  # (owner, text)
MAX_OWNERS = 32


class VectorCache:
    """Vectors by owner and text. Each owner has `max_entries` of its own, the least recently used dropped first.

    One owner's texts neither answer another owner's questions nor push its entries out, so a fast
    answer reveals nothing about another owner's texts. Memory is bounded by `max_owners`: the owner that asked least
    recently loses all its entries. Keys are digests, so no text stays in memory.
    """

    def __init__(self, max_entries: int, max_owners: int = MAX_OWNERS) -> None:
        self._max_entries, self._max_owners = max_entries, max_owners
        self._owners: OrderedDict[str, OrderedDict[bytes, NDArray[np.float32]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Iterable[OwnedText]) -> dict[OwnedText, NDArray[np.float32]]:
        """Return the vectors that are known, and mark each as the most recently used of its owner."""
        found = {}
        with self._lock:
            for owner, text in keys:
                entries = self._owners.get(owner, OrderedDict())
                vector = entries.get(_digest(text))
                if vector is not None:
                    entries.move_to_end(_digest(text))
                    found[owner, text] = vector
        return found

    def put(self, vectors: Mapping[OwnedText, NDArray[np.float32]]) -> None:
        """Keep the vectors as the most recently used ones of their owners."""
        with self._lock:
            for (owner, text), vector in vectors.items():
                entries = self._owners.setdefault(owner, OrderedDict())
                self._owners.move_to_end(owner)
                entries[_digest(text)] = vector.copy()  # a row view would keep its whole batch alive
                if len(entries) > self._max_entries:
                    entries.popitem(last=False)
            while len(self._owners) > self._max_owners:
                self._owners.popitem(last=False)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
