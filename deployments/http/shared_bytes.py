"""Share a budget of memory between tenants, so that no tenant can take all of it."""

from __future__ import annotations

from collections import Counter


class SharedBytes:
    """Grants at most `max_bytes` at once, and to one tenant at most as many as remain free.

    One tenant alone may hold a half, two a third each, and there is always room for another. A tenant that holds at
    most `always_bytes` is refused only if the budget is full. `has_tenants=False`: all requests belong to one tenant,
    which may use the whole budget.
    """

    def __init__(self, max_bytes: int, *, always_bytes: int = 0, has_tenants: bool = False) -> None:
        self.max_bytes = max_bytes
        self._always_bytes, self._has_tenants = always_bytes, has_tenants
        self._held: Counter[str] = Counter()
        self.num_bytes = 0

    def take(self, tenant: str, num_bytes: int) -> bool:
        """Take the bytes for this tenant. Return False, and take nothing, if they are not free for it."""
        free, own = self.max_bytes - self.num_bytes - num_bytes, self._held[tenant] + num_bytes
        if free < 0 or (self._has_tenants and num_bytes > 0 and own > max(free, self._always_bytes)):
            return False
        self.num_bytes += num_bytes
        self._held[tenant] = own
        return True

    def give(self, tenant: str, num_bytes: int) -> None:
        """Give back bytes that the tenant took."""
        self.num_bytes -= num_bytes
        self._held[tenant] -= num_bytes
        if not self._held[tenant]:
            del self._held[tenant]
