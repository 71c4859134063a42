from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.shared_cores import ratios, streams


def test_the_benchmark_fails_when_its_streams_die(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EOFError), streams(0, True, run=print):
        raise AssertionError("there are no streams")
    assert capfd.readouterr().out.startswith("0 True ")


def test_a_shared_rate_is_relative_to_those_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams never stop; the other process starts and ends while they decode."""
    now, tokens, speed, events = 0.0, 0.0, 100.0, list[str]()

    def sleep(seconds: float) -> None:
        nonlocal now, tokens
        now, tokens = now + seconds, tokens + seconds * speed

    def count() -> tuple[float, int]:
        return now, round(tokens)

    @contextmanager
    def busy() -> Iterator[None]:
        nonlocal speed
        events.append("starts")
        speed = 20.0
        yield
        speed = 150.0
        events.append("ends")

    monkeypatch.setattr("benchmarks.shared_cores.time.sleep", sleep)
    assert ratios(count, 2, 8, busy) == [20 / 125, 20 / 150]
    assert events == ["starts", "ends"] * 2 and now == 3 * 2 + 2 * 8 + 2
