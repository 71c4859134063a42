from __future__ import annotations

import pytest

from benchmarks.shared_cores import streams


def test_the_benchmark_fails_when_its_streams_die(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EOFError), streams(0, None, run=print):
        raise AssertionError("there are no streams")
    assert capfd.readouterr().out.startswith("0 None ")
