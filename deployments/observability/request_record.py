"""What is remembered of one request while it is answered: never its prompt, and no adapter's name."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field

from deployments.api.planned import Planned
from gpu_worker.request.request import Delta

_DIGEST_CHARS = 12
_current: ContextVar[RequestRecord] = ContextVar("request_record")


@dataclass(slots=True)
class RowTimes:
    """When a row's text came, by the record's clock, and how many tokens there were by then."""

    first_at: float
    first_tokens: int
    last_at: float
    last: Delta

    @property
    def token_s(self) -> float | None:
        """The mean time between two tokens; None of an answer that came at once."""
        more = self.last.num_new_tokens - self.first_tokens
        return (self.last_at - self.first_at) / more if more > 0 else None


@dataclass(slots=True)
class RequestRecord:
    """`route`: the pattern that was matched, never a path a client wrote. Seconds count from `began`."""

    request_id: str
    route: str
    method: str = ""
    began: float = field(default_factory=time.monotonic)
    status: int = 499  # as proxies say of a client that left before there was another
    code: str = ""  # of the API's error object
    strategy: str = "none"
    adapters: tuple[str, ...] = ()  # version digests
    abstained: bool = False
    plan_s: float | None = None
    rows: dict[int, RowTimes] = field(default_factory=dict)

    def planned(self, plans: Sequence[Planned], seconds: float) -> None:
        """A request of several prompts goes by the strategy of its first."""
        self.strategy, self.plan_s = plans[0].plan.strategy, seconds
        refs = dict.fromkeys(row.ref for planned in plans for row in planned.plan.adapters)
        self.adapters = tuple(ref.digest[:_DIGEST_CHARS] for ref in refs)
        self.abstained = any(planned.abstained for planned in plans)

    async def watch(self, index: int, deltas: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
        """The same deltas of row `index`; leaving closes `deltas`."""
        async with aclosing(deltas):
            async for delta in deltas:
                self._saw(index, delta)
                yield delta

    def _saw(self, index: int, delta: Delta) -> None:
        now = time.monotonic()
        times = self.rows.get(index)
        if times is None:
            self.rows[index] = RowTimes(now, delta.num_new_tokens, now, delta)
        else:
            times.last_at, times.last = now, delta

    @property
    def first_token_s(self) -> float | None:
        return min((row.first_at - self.began for row in self.rows.values()), default=None)

    @property
    def queued_s(self) -> float:
        """The longest any of its rows waited in an engine's queue."""
        return max((row.last.queued_s for row in self.rows.values()), default=0.0)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(row.last.num_prompt_tokens for row in self.rows.values())

    @property
    def num_new_tokens(self) -> int:
        return sum(row.last.num_new_tokens for row in self.rows.values())


def begin(record: RequestRecord) -> None:
    """What this task answers from now on."""
    _current.set(record)


def current() -> RequestRecord:
    """Of the HTTP request that this task answers."""
    return _current.get()


def note_refusal(code: str) -> None:
    """The request in hand, if it came over HTTP, is answered with this error."""
    record = _current.get(None)
    if record is not None:
        record.code = code
