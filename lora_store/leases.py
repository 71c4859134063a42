"""Publishing holds: no blob is deleted while a publish, in any process, counts on it.

A stage and a sweep each announce themselves before they look for the other, so at least one sees the other:

    stage                                      sweep
    1. write a hold that names its digests     1. write a mark that names the digests it may delete
    2. wait while a mark names one of them     2. read the holds
    3. write the blobs                         3. read the newest catalogue
    4. commit (or discard)                     4. delete what neither names
    5. end the hold                            5. remove the mark

A hold written before the sweep's step 2 is seen there; one written later finds the mark, and waits until the sweep is
over before it looks which blobs are there. A hold that is gone by step 2 was committed, which step 3 sees.

What a crash leaves is dead by its age: a hold after HOLD_S (a publish that took longer takes a new one and looks
again), a mark after MARK_S. A sweep deletes only during its first SWEEP_S, so a request it has under way ends before
its mark is dead. Clocks of the machines may differ by MARK_S - SWEEP_S less such a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from uuid import uuid4

from lora_store.files import Files
from lora_store.location import Location

HOLD_S = 3600.0
MARK_S = 60.0
SWEEP_S = 15.0
_POLL_S = 0.05
_ROUND_DIGESTS = 16  # a mark names no more: they are deleted side by side, in the time of one request


class Leases:
    """The holds and the marks of one store. Raises: StoreUnavailable."""

    def __init__(
        self, store: Location, now: Callable[[], datetime], sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._holds, self._marks = Files(store.child("holds")), Files(store.child("sweeps"))
        self._now, self._sleep = now, sleep

    def take(self, digests: Collection[str]) -> str:
        """A hold on these blobs, present or not yet written; no sweep is deleting any of them."""
        hold = ".".join([self._stamp(), *digests])
        self._holds.write(hold, b"", durable=False)  # its process does not outlast a power failure either
        while self._is_swept(digests):
            self._sleep(_POLL_S)
        return hold

    def end(self, holds: Collection[str]) -> None:
        """These hold nothing any more."""
        self._holds.delete(holds)

    def is_safe(self, hold: str) -> bool:
        """Whether a commit may still count on it."""
        return self._age_s(hold) < HOLD_S / 2

    def held(self) -> frozenset[str]:
        """The digests of all holds that are not dead."""
        names = [file.name for file in self._holds.entries() if self._age_s(file.name) < HOLD_S]
        return frozenset(digest for name in names for digest in name.split(".")[2:])

    def sweep(
        self,
        digests: Sequence[str],
        referenced: Callable[[], Collection[str]],
        delete: Callable[[Sequence[str]], object],
    ) -> list[str]:
        """Those of `digests` that were given to `delete`: nothing held them, and the newest catalogue names none."""
        free: list[str] = []
        for start in range(0, len(digests), _ROUND_DIGESTS):
            free += self._sweep_round(digests[start : start + _ROUND_DIGESTS], referenced, delete)
        return free

    def drop_dead(self) -> None:
        """Holds and marks of processes that crashed are gone."""
        for files, dead_s in ((self._holds, HOLD_S), (self._marks, MARK_S)):
            files.delete([file.name for file in files.entries() if self._age_s(file.name) >= dead_s])

    def _sweep_round(
        self,
        digests: Sequence[str],
        referenced: Callable[[], Collection[str]],
        delete: Callable[[Sequence[str]], object],
    ) -> list[str]:
        mark = self._stamp()
        self._marks.write(mark, "\n".join(digests).encode(), durable=False)
        try:
            held = self.held()
            needed = referenced()
            free = [digest for digest in digests if digest not in held and digest not in needed]
            if not free or self._age_s(mark) >= SWEEP_S:  # stages may be past a mark this old: the next sweep's work
                return []
            delete(free)
            return free
        finally:
            self._marks.delete([mark])

    def _is_swept(self, digests: Collection[str]) -> bool:
        fresh = [file.name for file in self._marks.entries() if self._age_s(file.name) < MARK_S]
        swept = b"\n".join(self._marks.read(name) or b"" for name in fresh).decode().split()
        return not set(swept).isdisjoint(digests)

    def _stamp(self) -> str:
        return f"{int(self._now().timestamp() * 1000)}.{uuid4().hex}"

    def _age_s(self, name: str) -> float:
        """Seconds since it was written; what no hold or mark is called is dead."""
        written_ms = name.removeprefix(".").partition(".")[0]  # a dot comes before what is being written
        return self._now().timestamp() - int(written_ms) / 1000 if written_ms.isdecimal() else float("inf")
