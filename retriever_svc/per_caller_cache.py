"""A cache of values computed for each caller, valid for one generation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from lora_store.lru_cache import LruCache

Value = TypeVar("Value")
_MAX_VALUES = 256  # callers choose the keys, so their number must be bounded


class PerCallerCache(Generic[Value]):
    """Values by caller. Two threads may compute the same value at once; both results are equal."""

    def __init__(self) -> None:
        self._values: LruCache[tuple[str, ...], Value] = LruCache(_MAX_VALUES)
        self._lock = threading.Lock()

    def get(self, key: tuple[str, ...], compute: Callable[[], Value]) -> Value:
        """Return the cached value of `key`, or compute and cache it."""
        with self._lock:
            cached = self._values.get(key)
        if cached is not None:
            return cached
        value = compute()
        with self._lock:
            self._values.put(key, value)
        return value
