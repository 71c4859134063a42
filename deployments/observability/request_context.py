"""The facts of one request that are reported when it ends: never its prompt, and no adapter's name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.api.planned import Planned
from deployments.auth.caller import Caller
from gpu_worker.request.request import Delta

_DIGEST_CHARS = 12


@dataclass(slots=True)
class RowTimes:
    """When the text of one row arrived, by the request's clock, with the token counts."""

    first_at: float
    first_tokens: int
    last_at: float
    last: Delta

    @property
    def token_s(self) -> float | None:
        """The mean time between two tokens; None if the whole answer arrived at once."""
        more = self.last.num_new_tokens - self.first_tokens
        return (self.last_at - self.first_at) / more if more > 0 else None


@dataclass(slots=True)
class RequestContext:
    """Everything the server remembers of one request while it answers it.

    The outermost middleware creates it for HTTP, the Ingress for a call through a Ray handle. `route` is the matched
    pattern, never a path that a client wrote. Times are of the process's monotonic clock.
    """

    request_id: str
    route: str
    method: str = ""
    arrived_at: float = field(default_factory=time.monotonic)
    caller: Caller | None = None  # set by the authentication, on routes that need a key
    status: int = 499  # what proxies log for a client that left before there was a status
    code: str = ""  # of the API's error object
    strategy: str = "none"
    adapters: tuple[str, ...] = ()  # version digests
    abstained: bool = False
    plan_s: float | None = None
    rows: dict[int, RowTimes] = field(default_factory=dict)

    def record_plans(self, plans: Sequence[Planned], seconds: float) -> None:
        """Record the plans. A request of several prompts is reported with the strategy of its first."""
        self.strategy, self.plan_s = plans[0].plan.strategy, seconds
        refs = dict.fromkeys(row.ref for planned in plans for row in planned.plan.adapters)
        self.adapters = tuple(ref.digest[:_DIGEST_CHARS] for ref in refs)
        self.abstained = any(planned.abstained for planned in plans)

    def record_delta(self, index: int, delta: Delta) -> None:
        """Record that a delta of row `index` arrived now."""
        now = time.monotonic()
        times = self.rows.get(index)
        if times is None:
            self.rows[index] = RowTimes(now, delta.num_new_tokens, now, delta)
        else:
            times.last_at, times.last = now, delta

    @property
    def first_token_s(self) -> float | None:
        return min((row.first_at - self.arrived_at for row in self.rows.values()), default=None)

    @property
    def queued_s(self) -> float:
        """The longest time any of its rows waited in an engine's queue."""
        return max((row.last.queued_s for row in self.rows.values()), default=0.0)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(row.last.num_prompt_tokens for row in self.rows.values())

    @property
    def num_new_tokens(self) -> int:
        return sum(row.last.num_new_tokens for row in self.rows.values())
