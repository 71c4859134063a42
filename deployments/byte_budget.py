"""A bound on bytes that are held at once: of request bodies, of uploads, of folders that are staged."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.errors import UploadMemoryFull


class ByteBudget:
    """Grants at most `max_bytes` at once. It may be used from any thread.

    Bytes cannot be taken back from their holder, so with `has_tenants` there is always room for another: a tenant may
    hold at most as many bytes as remain free, which is a half for one tenant and a third for each of two. A tenant that
    holds at most `always_bytes` is refused only if the budget is full.
    """

    def __init__(self, max_bytes: int, *, always_bytes: int = 0, has_tenants: bool = False) -> None:
        """Without `has_tenants` all bytes belong to one tenant, which may use the whole budget."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._always_bytes = always_bytes
        self._has_tenants = has_tenants
        self._held: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._waiting: dict[object, tuple[str, int]] = {}  # by ticket, in order of arrival: tenant and bytes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def take(self, tenant: str, num_bytes: int) -> bool:
        """Take the bytes for this tenant. Return False, and take nothing, if they are not free for it."""
        with self._changed:
            if self._free_after(num_bytes) < 0 or self._is_above_share(tenant, num_bytes):
                return False
            self.num_bytes += num_bytes
            self._held[tenant] += num_bytes
            return True

    def give(self, tenant: str, num_bytes: int) -> None:
        """Return bytes that the tenant took."""
        with self._changed:
            self.num_bytes -= num_bytes
            self._held[tenant] -= num_bytes
            if not self._held[tenant]:
                del self._held[tenant]
            self._changed.notify_all()

    @contextmanager
    def taken(self, tenant: str, num_bytes: int, wait_s: float) -> Iterator[None]:
        """Wait for the bytes, at most those that one tenant may hold, and hold them until the block ends.

        Threads get their bytes in the order of their arrival, so a large request is not overtaken by small ones. One
        whose tenant holds its share is passed over by those of other tenants.
        Raises: UploadMemoryFull if they do not become free within `wait_s`.
        """
        most = max(self._always_bytes, self.max_bytes // 2) if self._has_tenants else self.max_bytes
        num_bytes, ticket = min(num_bytes, most), object()

        def take_in_turn() -> bool:
            for other, wanted in self._waiting.items():
                if other is ticket:
                    break
                if not self._is_above_share(*wanted):
                    return False
            return self.take(tenant, num_bytes)

        with self._changed:
            self._waiting[ticket] = tenant, num_bytes
            try:
                if not self._changed.wait_for(take_in_turn, wait_s):
                    raise UploadMemoryFull(self.max_bytes)
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()
        try:
            yield
        finally:
            self.give(tenant, num_bytes)

    def _free_after(self, num_bytes: int) -> int:
        return self.max_bytes - self.num_bytes - num_bytes

    def _is_above_share(self, tenant: str, num_bytes: int) -> bool:
        own = self._held[tenant] + num_bytes
        return self._has_tenants and num_bytes > 0 and own > max(self._free_after(num_bytes), self._always_bytes)
