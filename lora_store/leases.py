"""Leases on blobs: no blob is deleted while a publish, in any process, relies on it.

A stage and a sweep each announce themselves before they look for the other, so at least one sees the other:

    stage                                      sweep
    1. write a lease that names its digests    1. write an intent that names the digests it may delete
    2. wait while an intent names one of them  2. read the leases
    3. write the blobs                         3. read the newest catalogue
    4. commit (or discard)                     4. delete the digests that neither names
    5. release the lease                       5. delete the intent

The sweep's step 2 sees every lease written before it. A lease written later sees the intent, and its stage waits until
the sweep is over before it checks which blobs exist. A lease released before step 2 was committed, so step 3 sees it.

Files left by a crash expire by age: a lease after LEASE_S (a publish that took longer takes a new lease and checks
again), an intent after INTENT_S. A sweep deletes only during its first SWEEP_S, so its last request ends before its
intent expires. The clocks of the machines may differ by INTENT_S - SWEEP_S, less the time of such a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from uuid import uuid4

from lora_store.errors import StoreUnavailable
from lora_store.files import Files
from lora_store.location import Location

LEASE_S = 3600.0
INTENT_S = 60.0
SWEEP_S = 15.0
_POLL_S = 0.05
_ROUND_DIGESTS = 16  # per intent: so many are deleted in parallel, in the time of one request
_LEASE_FOLDER, _INTENT_FOLDER = "holds", "sweeps"  # names on disk, kept for existing stores


class Leases:
    """The leases and sweep intents of one store. Raises: StoreUnavailable."""

    def __init__(
        self, store: Location, now: Callable[[], datetime], sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._leases, self._intents = Files(store.child(_LEASE_FOLDER)), Files(store.child(_INTENT_FOLDER))
        self._now, self._sleep = now, sleep

    def acquire(self, digests: Collection[str]) -> str:
        """Lease these blobs, whether they exist yet or not, and wait for sweeps that may delete one of them."""
        lease = ".".join([self._stamp(), *digests])
        try:
            self._leases.write(lease, b"", durable=False)  # a power failure ends the process that needs it, too
            while self._is_swept(digests):
                self._sleep(_POLL_S)
        except BaseException:
            with suppress(StoreUnavailable):  # then it expires
                self.release([lease])
            raise
        return lease

    def release(self, leases: Collection[str]) -> None:
        """Delete these leases."""
        self._leases.delete(leases)

    def is_safe(self, lease: str) -> bool:
        """Return whether a commit may still rely on the lease."""
        return self._age_s(lease) < LEASE_S / 2

    def leased(self) -> frozenset[str]:
        """Return the digests of all leases that have not expired."""
        names = [file.name for file in self._leases.entries() if self._age_s(file.name) < LEASE_S]
        return frozenset(digest for name in names for digest in name.split(".")[2:])

    def sweep(
        self,
        digests: Sequence[str],
        referenced: Callable[[], Collection[str]],
        delete: Callable[[Sequence[str]], object],
    ) -> list[str]:
        """Call `delete` for those of `digests` that are neither leased nor in `referenced()`. Return those digests."""
        free: list[str] = []
        for start in range(0, len(digests), _ROUND_DIGESTS):
            free += self._sweep_round(digests[start : start + _ROUND_DIGESTS], referenced, delete)
        return free

    def delete_expired(self) -> None:
        """Delete the leases and intents of processes that crashed."""
        for files, lifetime_s in ((self._leases, LEASE_S), (self._intents, INTENT_S)):
            files.delete([file.name for file in files.entries() if self._age_s(file.name) >= lifetime_s])

    def _sweep_round(
        self,
        digests: Sequence[str],
        referenced: Callable[[], Collection[str]],
        delete: Callable[[Sequence[str]], object],
    ) -> list[str]:
        intent = self._stamp()
        self._intents.write(intent, "\n".join(digests).encode(), durable=False)
        try:
            leased = self.leased()
            needed = referenced()
            free = [digest for digest in digests if digest not in leased and digest not in needed]
            if not free or self._age_s(intent) >= SWEEP_S:  # stages may ignore so old an intent: leave it to the next
                return []
            delete(free)
            return free
        finally:
            self._intents.delete([intent])

    def _is_swept(self, digests: Collection[str]) -> bool:
        """Return whether a sweep in progress may delete one of these."""
        fresh = [file.name for file in self._intents.entries() if self._age_s(file.name) < INTENT_S]
        swept = b"\n".join(self._intents.read(name) or b"" for name in fresh).decode().split()
        return not set(swept).isdisjoint(digests)

    def _stamp(self) -> str:
        return f"{int(self._now().timestamp() * 1000)}.{uuid4().hex}"

    def _age_s(self, name: str) -> float:
        """Return the seconds since the file was written, or infinity if the name is malformed."""
        written_ms = name.removeprefix(".").partition(".")[0]  # a leading dot marks a write in progress
        return self._now().timestamp() - int(written_ms) / 1000 if written_ms.isdecimal() else float("inf")
