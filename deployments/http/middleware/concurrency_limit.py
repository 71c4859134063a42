"""Limit how many requests an Ingress replica works on, fairly between tenants."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.auth.caller import ANONYMOUS_TENANT
from deployments.errors import ServerOverloaded
from deployments.http.error_responses import error_response
from deployments.http.middleware.request_context import context_of, path_of

WAITS_S = 10.0  # a refused client retries after a second or more
_ALWAYS_ANSWERED = ("/health", "/ready")


class InFlight:
    """Counts the requests of one replica, each until the last byte of its answer.

    A tenant that is alone may use every place. A tenant's share is the limit divided by the number of tenants that run
    requests or were refused. A tenant that was refused below its share waits: for `WAITS_S`, tenants at or above their
    share are refused, so that a free place is left when it retries.

    Requests without a caller take places too, but the anonymous tenant has no share: it never waits, makes no other
    share smaller, and is refused while any tenant waits.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._counts: Counter[str] = Counter()
        self._waits_until: dict[str, float] = {}
        self.count = 0

    def enter(self, tenant: str) -> None:
        """Raises: ServerOverloaded."""
        now = self._clock()
        self._waits_until = {other: until for other, until in self._waits_until.items() if until > now}
        has_share = tenant == ANONYMOUS_TENANT or self._counts[tenant] >= self._share_with(tenant)
        if self.count >= self._limit:
            if not has_share:
                self._waits_until[tenant] = now + WAITS_S
            raise ServerOverloaded(self._limit)
        if has_share and any(other != tenant for other in self._waits_until):
            raise ServerOverloaded(self._limit)
        self._waits_until.pop(tenant, None)
        self._counts[tenant] += 1
        self.count += 1

    def leave(self, tenant: str) -> None:
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant]
        self.count -= 1

    def _share_with(self, tenant: str) -> int:
        here = {other for other, count in self._counts.items() if count} | self._waits_until.keys() | {tenant}
        return max(1, self._limit // len(here - {ANONYMOUS_TENANT}))


class ConcurrencyLimit:
    """ASGI middleware: refuse requests above the limit before their body is read. Probes are always answered."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app, self._in_flight = app, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        tenant = tenant_of(scope)
        try:
            self._in_flight.enter(tenant)
        except ServerOverloaded as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.leave(tenant)


def tenant_of(scope: Scope) -> str:
    """Return the caller's tenant; the anonymous one on routes that need no key."""
    caller = context_of(scope).caller
    return ANONYMOUS_TENANT if caller is None else caller.tenant
