"""What was computed for a caller, kept while its generation is served."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")
_MAX_VIEWS = 256  # callers choose the keys, so their number has a bound


class ViewCache(Generic[Value]):
    """Values by caller, the least recently used dropped first. Two threads may both compute one: it is the same."""

    def __init__(self) -> None:
        self._views: OrderedDict[tuple[str, ...], Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, ...], compute: Callable[[], Value]) -> Value:
        with self._lock:
            if key in self._views:
                self._views.move_to_end(key)
                return self._views[key]
        value = compute()
        with self._lock:
            self._views[key] = value
            if len(self._views) > _MAX_VIEWS:
                self._views.popitem(last=False)
        return value
