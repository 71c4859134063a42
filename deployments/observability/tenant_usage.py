"""Usage of one Worker by tenant. A tenant sees its own usage, never that of others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from deployments.calls.worker_client import Usage
from gpu_worker.request.request import Delta

_MAX_TENANTS = 4096  # tenants come and go with the keys file


class TenantUsage:
    """Usage by tenant, on one event loop. Above `max_tenants` the least recently active tenant is forgotten."""

    def __init__(self, max_tenants: int = _MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._usages: OrderedDict[str, Usage] = OrderedDict()

    @contextmanager
    def row(self, tenant: str) -> Iterator[Row]:
        """Count a row while it runs. Pass each of its deltas to the returned counter."""
        usage = self._usages.setdefault(tenant, Usage())
        self._usages.move_to_end(tenant)
        if len(self._usages) > self._max_tenants:
            self._usages.popitem(last=False)
        usage.num_requests += 1
        usage.num_running += 1
        try:
            yield Row(usage)
        finally:
            usage.num_running -= 1

    def read(self) -> Mapping[str, Usage]:
        """Return a copy of the counts."""
        return {tenant: replace(usage) for tenant, usage in self._usages.items()}


@dataclass(slots=True)
class Row:
    """Counts the tokens of one row."""

    usage: Usage
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0

    def count(self, delta: Delta) -> None:
        """Add the tokens since the last delta."""
        self.usage.num_prompt_tokens += delta.num_prompt_tokens - self.num_prompt_tokens
        self.usage.num_new_tokens += delta.num_new_tokens - self.num_new_tokens
        self.num_prompt_tokens, self.num_new_tokens = delta.num_prompt_tokens, delta.num_new_tokens
