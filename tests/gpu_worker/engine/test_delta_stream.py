"""The stream of one request's deltas: at once, merged within an interval, with heartbeats, and its error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gpu_worker.engine.delta_stream import Events, deltas, merged
from gpu_worker.errors import EngineStopped
from gpu_worker.request.request import Delta
from gpu_worker.request.tools import ToolCallPiece
from tests.virtual_time import run_in_virtual_time


def delta(text: str, number: int, *, is_last: bool = False) -> Delta:
    return Delta(text, 3, number, "length" if is_last else None)


async def feed(events: Events, script: Sequence[tuple[float, Delta | Exception]]) -> None:
    """Put each event after its pause in seconds."""
    for pause_s, event in script:
        await asyncio.sleep(pause_s)
        events.put_nowait(event)


def streamed(
    script: Sequence[tuple[float, Delta | Exception]], interval_s: float, heartbeat_interval_s: float | None = None
) -> list[str | None]:
    async def main() -> list[str | None]:
        events: Events = asyncio.Queue()
        feeding = asyncio.create_task(feed(events, script))
        found = [one and one.text async for one in deltas(events, interval_s, heartbeat_interval_s)]
        await feeding
        return found

    return run_in_virtual_time(main())


def test_the_first_delta_is_sent_at_once_and_later_ones_are_merged_by_interval() -> None:
    script = [(0.0, delta("a", 1)), *[(0.4, delta(text, number)) for number, text in enumerate("bcd", 2)]]
    script.append((0.4, delta("e", 5, is_last=True)))
    assert streamed(script, interval_s=1.0) == ["a", "bc", "de"]


def test_a_wait_without_text_yields_heartbeats() -> None:
    script = [(2.5, delta("a", 1)), (0.1, delta("b", 2, is_last=True))]
    assert streamed(script, interval_s=0.0, heartbeat_interval_s=1.0) == [None, None, "a", "b"]


def test_an_error_among_the_events_is_raised_after_the_text_before_the_interval() -> None:
    with pytest.raises(EngineStopped):
        streamed([(0.0, delta("a", 1)), (0.1, delta("b", 2)), (0.1, EngineStopped("gone"))], interval_s=1.0)


def test_merging_keeps_the_last_counts_and_all_text() -> None:
    events: Events = asyncio.Queue()
    events.put_nowait(delta("b", 2))
    events.put_nowait(delta("c", 3, is_last=True))
    whole = merged(delta("a", 1), events)
    assert (whole.text, whole.num_new_tokens, whole.finish_reason) == ("abc", 3, "length")


def test_merging_keeps_the_pieces_of_calls_in_order() -> None:
    begun, more = ToolCallPiece(0, "", "c1", "f"), ToolCallPiece(0, "{}")
    events: Events = asyncio.Queue()
    events.put_nowait(replace(delta("", 2), tool_calls=(more,)))
    assert merged(replace(delta("", 1), tool_calls=(begun,)), events).tool_calls == (begun, more)
