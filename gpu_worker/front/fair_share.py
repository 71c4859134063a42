"""The rule by which tenants share places: of a queue, of threads, of requests in progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection


class FairShare:
    """Counts the places that each tenant holds, and decides which tenant gives way when all are taken.

    One tenant may use every place while it is alone. When others arrive, each gets an equal share: a tenant below its
    share takes the place of the newest waiting item of the tenant that holds most, as long as that one still holds as
    much as the other would have. A tenant that has its share is refused.
    Where places cannot be taken back, such as those of running requests, a tenant that has its share is refused while
    another waits for its own.
    """

    def __init__(self, *, without_share: str | None = None) -> None:
        """Create a count of no places. `without_share`: a tenant that has no share and makes no other share smaller."""
        self._without_share = without_share
        self._held: Counter[str] = Counter()
        self.num_held = 0

    def copy(self) -> FairShare:
        """Return a count of its own with the same places."""
        copied = FairShare(without_share=self._without_share)
        copied._held, copied.num_held = self._held.copy(), self.num_held
        return copied

    def take(self, tenant: str, count: int = 1) -> None:
        """Count places that the tenant now holds."""
        self._held[tenant] += count
        self.num_held += count

    def give(self, tenant: str, count: int = 1) -> None:
        """Count places that the tenant no longer holds."""
        self.num_held -= count
        self._held[tenant] -= count
        if not self._held[tenant]:
            del self._held[tenant]

    def has_share(self, tenant: str, num_places: int, waiting: Collection[str] = ()) -> bool:
        """Return whether the tenant holds its equal share of the places. `waiting`: tenants that wait for theirs."""
        if tenant == self._without_share:
            return True
        num_tenants = len((self._held.keys() | {tenant, *waiting}) - {self._without_share})
        return self._held[tenant] * num_tenants >= num_places

    def displaced_by(self, tenant: str, num_places: int, wanted: int = 1) -> str | None:
        """Return the tenant that gives way to this one, which wants this many more places, or None."""
        most = max(self._held, key=self._held.__getitem__, default=tenant)
        if self.has_share(tenant, num_places) or self._held[most] <= self._held[tenant] + wanted:
            return None
        return most
