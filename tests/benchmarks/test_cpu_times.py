"""CPU times by kind of process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.cpu_times import CLIENT, RAY, cpu_ms, process_kind


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ray::ServeReplica:loraretriever:Ingress", "Ingress"),
        ("ray::ServeReplica:loraretriever:Worker.stream()", "Worker"),
        ("ray::ServeController.listen_for_change()", "Serve's controller"),
        ("ray::ProxyActor", "Serve's proxy"),
        ("/venv/ray/core/src/ray/raylet/raylet --raylet_socket_name=x", RAY),
        ("/venv/bin/python -u /venv/ray/_private/log_monitor.py --session-dir=x", RAY),
        ("/usr/bin/python3 serve.py raylet", None),
        ("ray::IDLE", None),
    ],
)
def test_a_process_is_known_by_its_command_line(command: str, kind: str | None) -> None:
    assert process_kind(command) == kind


def test_times_of_one_kind_are_added(tmp_path: Path) -> None:
    tick_ms = 1000 // os.sysconf("SC_CLK_TCK")
    for number, (command, times) in enumerate(
        [("ray::ServeReplica:a:Worker", "3 4"), ("ray::ServeReplica:a:Worker", "10 0"), ("vim", "50 50")]
    ):
        folder = tmp_path / str(2**30 + number)
        folder.mkdir()
        (folder / "cmdline").write_text(command)
        (folder / "stat").write_text(f"1 (a) b) S 1 1 1 0 -1 0 0 0 0 0 {times} 7 7 20")
    (tmp_path / "loadavg").write_text("0")
    (tmp_path / "5").mkdir()  # has just ended
    assert cpu_ms(tmp_path) == {"Worker": 17 * tick_ms}


def test_work_of_this_process_counts_for_the_client() -> None:
    before, used = cpu_ms()[CLIENT], time.process_time()
    while time.process_time() - used < 0.1:
        pass
    assert cpu_ms()[CLIENT] - before >= 80
