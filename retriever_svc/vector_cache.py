"""A bounded cache of text vectors that remembers no text."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


class VectorCache:
    """Vectors by text, the least recently used dropped first. Keys are digests, so no prompt is kept in memory."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, texts: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """The vectors of those texts that are known, each now the most recently used."""
        found = {}
        with self._lock:
            for text in texts:
                vector = self._entries.get(_key(text))
                if vector is not None:
                    self._entries.move_to_end(_key(text))
                    found[text] = vector
        return found

    def put(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        with self._lock:
            for text, vector in vectors.items():
                self._entries[_key(text)] = vector.copy()  # a row view would keep its whole batch alive
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
