"""The stream of one request's deltas: at once, merged within an interval, with heartbeats, and its error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from gpu_worker.errors import EngineStopped
from gpu_worker.front.delta_stream import EventMail, Events, StreamPace, deltas, merged
from gpu_worker.front.request.request import Delta, TokenLogprob
from gpu_worker.front.request.tools import ToolCallPiece
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
        events, pace = Events(), StreamPace(1000 * interval_s)
        feeding = asyncio.create_task(feed(events, script))
        found = [one and one.text async for one in deltas(events, pace, heartbeat_interval_s)]
        assert not pace.sending
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


def test_merging_keeps_the_last_counts_and_all_text_calls_and_log_probabilities() -> None:
    pieces = [ToolCallPiece(0, "", "c1", "f"), ToolCallPiece(0, "{}"), ToolCallPiece(0, "x")]
    scores = [TokenLogprob(text.encode(), -0.5, (), 0) for text in "abc"]
    parts = [delta("a", 1), delta("b", 2), delta("c", 3, is_last=True)]
    parts = [replace(p, tool_calls=(c,), logprobs=(s,)) for p, c, s in zip(parts, pieces, scores, strict=True)]
    events = Events()
    for part in parts[1:]:
        events.put_nowait(part)
    whole = merged(parts[0], events)
    assert (whole.text, whole.num_new_tokens, whole.finish_reason) == ("abc", 3, "length")
    assert (whole.tool_calls, whole.logprobs) == (tuple(pieces), tuple(scores))


def test_the_last_delta_is_sent_at_once() -> None:
    async def main() -> list[tuple[float, str]]:
        events, loop = Events(), asyncio.get_running_loop()
        script = [(0.0, delta("a", 1)), (0.1, delta("b", 2)), (0.1, delta("c", 3, is_last=True))]
        feeding = asyncio.create_task(feed(events, script))
        found = [(loop.time(), one.text) async for one in deltas(events, StreamPace(5000.0), None) if one is not None]
        await feeding
        return found

    (first_at, first), (last_at, last) = run_in_virtual_time(main())
    assert (first, last) == ("a", "bc")
    assert last_at - first_at == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("num_streams", "num_sent"), [(1, 10), (4, 10), (8, 5), (20, 2)])
def test_many_streams_send_less_often_but_their_first_text_at_once(num_streams: int, num_sent: int) -> None:
    """40 messages a second, an interval of 100 ms, and a token every 10 ms for a second."""

    async def main() -> list[list[float]]:
        pace, loop = StreamPace(100.0, messages_s=40), asyncio.get_running_loop()
        queues = [Events() for _ in range(num_streams)]
        script = [(0.01, delta("a", number)) for number in range(1, 101)] + [(0.0, delta("a", 101, is_last=True))]

        async def sent(events: Events) -> list[float]:
            return [loop.time() async for _ in deltas(events, pace, None)]

        feeding = [asyncio.create_task(feed(events, script)) for events in queues]
        started = loop.time()
        times = await asyncio.gather(*[sent(events) for events in queues])
        await asyncio.gather(*feeding)
        return [[at - started for at in of_stream] for of_stream in times]

    for times in run_in_virtual_time(main()):
        assert times[0] < 0.02
        assert len(times) - 2 == pytest.approx(num_sent, abs=1)  # besides the first and the last


def test_streams_that_start_apart_send_together() -> None:
    """Four streams start 30 ms apart; an interval of 100 ms, and a token every 10 ms."""

    async def main() -> list[list[float]]:
        pace, loop = StreamPace(100.0), asyncio.get_running_loop()
        script = [(0.01, delta("a", number)) for number in range(1, 101)]

        async def sent(place: int) -> list[float]:
            await asyncio.sleep(0.03 * place)
            events = Events()
            feeding = asyncio.create_task(feed(events, [*script, (0.0, delta("a", 101, is_last=True))]))
            times = [loop.time() async for _ in deltas(events, pace, None)]
            await feeding
            return times

        return await asyncio.gather(*[sent(place) for place in range(4)])

    streams = run_in_virtual_time(main())
    assert len({round(times[0], 3) for times in streams}) == 4  # the first text of each at once
    ticks = {round(at, 3) for times in streams for at in times[1:-1]}
    assert len(ticks) <= 11
    for times in streams:
        gaps = [later - at for at, later in pairwise(times[:-1])]
        assert 0.045 < gaps[0] < 0.155
        assert gaps[1:] == pytest.approx([0.1] * (len(times) - 3), abs=0.011)


def test_streams_without_text_yet_do_not_slow_others() -> None:
    async def main() -> float:
        pace, waiting = StreamPace(100.0, messages_s=10), [Events() for _ in range(50)]
        tasks = [asyncio.create_task(anext(deltas(events, pace, None))) for events in waiting]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        return pace.interval_s

    assert run_in_virtual_time(main()) == pytest.approx(0.1)


def test_without_an_interval_every_delta_is_sent_at_once() -> None:
    pace = StreamPace(0.0, messages_s=1)
    pace.sending.update(Events() for _ in range(100))
    assert pace.interval_s == 0


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts its wake-ups by other threads."""

    num_woken = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, **options: Any) -> asyncio.Handle:
        self.num_woken += 1
        return super().call_soon_threadsafe(callback, *args, **options)


def test_the_events_of_a_step_wake_the_loop_once() -> None:
    loop = CountingLoop()
    mail, queues = EventMail(loop), [Events(), Events()]
    for step in (1, 2):
        for number, events in enumerate([*queues, queues[0]]):
            mail.send(events, delta(f"{step}{number}", number, is_last=True))
        assert loop.num_woken == step
        loop.run_until_complete(asyncio.sleep(0))
        assert [events.has_last.is_set() for events in queues] == [True, True]
        assert [queues[0].get_nowait(), queues[0].get_nowait()] == [
            delta(f"{step}0", 0, is_last=True),
            delta(f"{step}2", 2, is_last=True),
        ]
        assert queues[1].get_nowait().text == f"{step}1"
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            mail.send(queues[0], delta("late", 1))


def test_no_event_of_another_thread_is_late_or_lost() -> None:
    async def main() -> list[list[str]]:
        mail, queues = EventMail(asyncio.get_running_loop()), [Events(), Events()]

        def send_all() -> None:
            for number in range(5_000):
                mail.send(queues[number % 2], delta(str(number), number))

        async def read(events: Events) -> list[str]:
            return [merged(await events.get(), Events()).text for _ in range(2_500)]

        sending = asyncio.to_thread(send_all)
        async with asyncio.timeout(60):
            *found, _ = await asyncio.gather(*map(read, queues), sending)
        return found

    assert asyncio.run(main()) == [[str(number) for number in range(first, 5_000, 2)] for first in (0, 1)]
