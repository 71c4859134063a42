from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.shared_cores import ratios, streams


def test_the_benchmark_fails_when_its_streams_die(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EOFError), streams(0, True, run=print):
        raise AssertionError("there are no streams")
    assert capfd.readouterr().out.startswith("0 True ")


def test_a_shared_rate_is_relative_to_those_around_it() -> None:
    """Two ways to decode take turns within each state of the machine."""
    asked: list[str] = []

    def way(name: str, *answers: float) -> Callable[[float], float]:
        left = iter(answers)

        def rate(seconds: float) -> float:
            asked.append(name)
            return next(left)

        return rate

    found = ratios([way("a", 100, 30, 200, 20, 200), way("b", 10, 9, 8, 4, 8)], 2, 5)
    assert found == [[0.2, 0.1], [1.0, 0.5]]
    assert asked == ["a", "b"] * 5
