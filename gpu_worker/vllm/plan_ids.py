"""Give each plan the integer that vLLM keeps per token."""

from __future__ import annotations

from collections import OrderedDict

_MAX_KEPT = 65_536  # a multiple of the plans that can run at once: an id that is dropped has not run for long


class PlanIds:
    """Ids by plan path, never used twice. To vLLM requests of equal paths are one, so a path has one id at a time."""

    def __init__(self, max_kept: int = _MAX_KEPT) -> None:
        self._ids: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._max_kept = max_kept
        self._next = 1  # 0 is the base model

    def __call__(self, path: str) -> int:
        """Return the id of the path. The least recently used paths are forgotten."""
        if path in self._ids:
            self._ids.move_to_end(path)
            return self._ids[path]
        self._ids[path], self._next = self._next, self._next + 1
        if len(self._ids) > self._max_kept:
            self._ids.popitem(last=False)
        return self._ids[path]
