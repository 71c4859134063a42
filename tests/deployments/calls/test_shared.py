from __future__ import annotations

import asyncio
import contextvars
import gc
from dataclasses import dataclass, field

import pytest

from deployments.calls.shared import Shared

KEPT_S = 0.5


@dataclass
class Counted:
    """Answers its calls with their numbers once it is open, the first of them with `errors`."""

    errors: list[Exception] = field(default_factory=list)
    num_calls: int = 0
    num_cancelled: int = 0
    now_s: float = 0.0
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> int:
        self.num_calls += 1
        number = self.num_calls
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.errors:
            raise self.errors.pop(0)
        return number

    def shared(self, *, keeps_errors: bool = False) -> Shared[int]:
        return Shared(self, kept_s=KEPT_S, keeps_errors=keeps_errors, clock=lambda: self.now_s)


async def test_callers_at_the_same_time_share_one_call_however_long_it_takes() -> None:
    counted = Counted()
    shared = counted.shared()
    early = asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    counted.now_s = 100 * KEPT_S
    late = asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    counted.open.set()
    assert await asyncio.gather(early, late) == [1, 1]


async def test_an_answer_is_kept_for_a_while_after_its_call_ended_however_slow_that_was() -> None:
    counted = Counted()
    shared = counted.shared()
    first = asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    counted.now_s = 10 * KEPT_S
    counted.open.set()
    found = [await first]
    for counted.now_s in (10 * KEPT_S, 10.9 * KEPT_S, 11 * KEPT_S, 11.9 * KEPT_S):
        found.append(await shared.get())
    assert found == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(("keeps_errors", "num_calls"), [(False, 2), (True, 1)])
async def test_a_failed_call_is_repeated_unless_its_error_is_kept(keeps_errors: bool, num_calls: int) -> None:
    counted = Counted(errors=[ValueError("first"), ValueError("second")])
    counted.open.set()
    shared = counted.shared(keeps_errors=keeps_errors)
    for _ in range(2):
        with pytest.raises(ValueError, match="first" if keeps_errors else "first|second"):
            await shared.get()
    assert counted.num_calls == num_calls


async def test_a_caller_that_leaves_does_not_cancel_the_call_of_the_others() -> None:
    counted = Counted()
    shared = counted.shared()
    leaving, staying = asyncio.create_task(shared.get()), asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    counted.open.set()
    assert await staying == 1 and counted.num_cancelled == 0


async def test_the_call_does_not_run_in_the_context_of_its_first_caller() -> None:
    """Serve cancels the calls that were made in the context of a request whose client leaves."""
    request = contextvars.ContextVar("request", default="none")

    async def read_request() -> str:
        return request.get()

    request.set("of the first caller")
    assert await Shared(read_request, kept_s=KEPT_S).get() == "none"


async def test_an_error_that_no_caller_waits_for_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    counted = Counted(errors=[ValueError("abandoned")])
    shared = counted.shared()
    leaving = asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    counted.open.set()
    await asyncio.sleep(0.01)
    del shared
    gc.collect()
    assert caplog.records == []
