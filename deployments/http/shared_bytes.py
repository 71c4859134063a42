"""Bytes in memory that tenants share, so that no tenant can take all of them."""

from __future__ import annotations

from collections import Counter


class SharedBytes:
    """At most `max_bytes` at once, and of one tenant at most as many as then remain free.

    So one tenant alone holds a half, two hold a third each, and there is always room for the next one. A tenant that
    holds no more than `always_bytes` is refused only when the whole is full. `has_tenants=False`: everybody is the
    same tenant, which may use the whole.
    """

    def __init__(self, max_bytes: int, *, always_bytes: int = 0, has_tenants: bool = False) -> None:
        self.max_bytes = max_bytes
        self._always_bytes, self._has_tenants = always_bytes, has_tenants
        self._held: Counter[str] = Counter()
        self.num_bytes = 0

    def take(self, tenant: str, num_bytes: int) -> bool:
        """Return whether the bytes were free for this tenant; they are its own then."""
        free, own = self.max_bytes - self.num_bytes - num_bytes, self._held[tenant] + num_bytes
        if free < 0 or (self._has_tenants and num_bytes > 0 and own > max(free, self._always_bytes)):
            return False
        self.num_bytes += num_bytes
        self._held[tenant] = own
        return True

    def give(self, tenant: str, num_bytes: int) -> None:
        """Return bytes that the tenant took."""
        self.num_bytes -= num_bytes
        self._held[tenant] -= num_bytes
        if not self._held[tenant]:
            del self._held[tenant]
