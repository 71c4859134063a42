"""A lock that is handed over in the order it was asked for."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """Python's own lock goes to whoever is quickest: one that takes it again and again would keep all others out."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._turns: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Event()
            self._turns.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._turns:
                self._turns.popleft().set()  # it stays held: the next in turn has it now
            else:
                self._is_held = False
