"""A bounded cache of text vectors with a separate part for each owner. It stores no text."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from lora_store.lru_cache import LruCache

OwnedText = tuple[str, str]  # (owner, text)
SAMPLES_OWNER = "samples:"  # no tenant has this name: the samples of all tenants that checks of the pool read
MAX_OWNERS = 32
_Part = LruCache[bytes, NDArray[np.float32]]


class VectorCache:
    """Vectors by owner and text. Each owner has `max_entries` of its own and evicts only its own entries.

    One owner's texts never answer another owner's look-ups, so a fast answer reveals nothing about another owner's
    texts. `max_owners` bounds the memory: the least recently used owner loses all its entries. Keys are digests, so no
    text stays in memory.
    """

    def __init__(self, max_entries: int, max_owners: int = MAX_OWNERS) -> None:
        self._max_entries = max_entries
        self._owners: LruCache[str, _Part] = LruCache(max_owners)
        self._lock = threading.Lock()

    def get(self, keys: Iterable[OwnedText]) -> dict[OwnedText, NDArray[np.float32]]:
        """Return the cached vectors, and mark each as the most recently used of its owner."""
        found = {}
        with self._lock:
            for owner, text in keys:
                part = self._owners.get(owner)
                vector = None if part is None else part.get(_digest(text))
                if vector is not None:
                    found[owner, text] = vector
        return found

    def put(self, vectors: Mapping[OwnedText, NDArray[np.float32]]) -> None:
        """Cache the vectors as the most recently used ones of their owners."""
        with self._lock:
            for (owner, text), vector in vectors.items():
                part = self._owners.get(owner)
                if part is None:
                    part = LruCache(self._max_entries)
                    self._owners.put(owner, part)
                part.put(_digest(text), vector.copy())  # a view of a row would keep its whole batch in memory


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
