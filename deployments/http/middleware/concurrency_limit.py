"""An Ingress replica counts the requests it works on, and refuses at once what comes above its limit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.auth.caller import ANONYMOUS_TENANT, Caller
from deployments.calls.deadlines import mark_arrival
from deployments.errors import ServerOverloaded
from deployments.http.error_responses import error_response
from deployments.http.streaming import path_of

WAITS_S = 10.0  # a client that was refused asks again after a second or more
_ALWAYS_ANSWERED = ("/health", "/ready")


class InFlight:
    """How many requests this replica works on, each until the last byte of its answer.

    A tenant that is alone may use every place. One that was refused while it held less than its share, the limit
    divided by the tenants that are here or were refused, waits: for `WAITS_S` those that hold their share or more are
    refused, so that the places that become free are there when it asks again.

    Requests without a caller take places too, but NOBODY has no share: it never waits, makes no tenant's share smaller,
    and is refused while any tenant waits.
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


class InFlightLimit:
    """ASGI middleware, the outermost: of what it refuses not even the body is read."""

    def __init__(self, app: ASGIApp, in_flight: Callable[[], InFlight]) -> None:
        self._app, self._in_flight = app, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        mark_arrival()
        in_flight, tenant = self._in_flight(), tenant_of(scope)
        try:
            in_flight.enter(tenant)
        except ServerOverloaded as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            in_flight.leave(tenant)


def tenant_of(scope: Scope) -> str:
    """Return the caller's tenant, NOBODY on the routes that ask for no key."""
    caller = scope.get("state", {}).get("caller")
    return caller.tenant if isinstance(caller, Caller) else ANONYMOUS_TENANT
