"""An engine's processes end with the process that started it, however that ends."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_worker.vllm.processes import ErrorFile, descendants, read_errors

PROGRAM = """
import os, subprocess, sys, time
from gpu_worker.vllm.processes import end_with, kill_descendants
level, first = int(sys.argv[1]), int(sys.argv[2])
if level:
    below = [str(level - 1), str(first or os.getpid()), sys.argv[3]]
    subprocess.Popen([sys.executable, "-c", open(sys.argv[3]).read(), *below])
else:
    end_with(first)
    print("started", flush=True)
if not first:
    sys.stdin.readline()
    kill_descendants()
time.sleep(60)
"""


@pytest.mark.parametrize("levels", [1, 2], ids=["child", "grandchild"])
@pytest.mark.parametrize("how", ["killed", "kills them"])
def test_no_process_outlives_the_first_one(levels: int, how: str, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    command = [sys.executable, "-c", PROGRAM, str(levels), "0", str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "started\n"
        started = descendants(first.pid)
        assert len(started) == levels
        if how == "killed":
            first.kill()
        else:
            os.kill(started[-1], signal.SIGSTOP)  # a process that hangs cannot end itself
            first.stdin.write("\n")
            first.stdin.flush()
        deadline = time.monotonic() + 120
        while any(is_running(pid) for pid in started) and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = [not is_running(pid) for pid in started]
        first.kill()
    assert ended == [True] * levels


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


LOG_AFTER_IMPORT = """
import logging, logging.handlers
logging.getLogger("replica").propagate = False
target = logging.StreamHandler()
logging.getLogger("replica").addHandler(logging.handlers.MemoryHandler(1, target=target))
import gpu_worker.vllm.engine
from vllm.config import LoggingConfig
from vllm.logger import configure_logging
configure_logging(LoggingConfig())
logging.getLogger("replica").error("still here")
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_handler_of_the_replica_still_writes_with_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOG_AFTER_IMPORT], capture_output=True, text=True, timeout=120, check=True
    )
    assert "still here\n" in done.stderr


def test_each_error_of_the_processes_is_kept_once_and_without_those_that_only_point_to_it(tmp_path: Path) -> None:
    file = tmp_path / "errors"
    assert read_errors(file) == []
    logger = logging.Logger("a process")
    logger.addHandler(ErrorFile(str(file)))
    errors = [ValueError("no\n  layer"), ValueError("no\n  layer"), KeyError("x"), OSError("y" * 1000)]
    errors.insert(1, RuntimeError("it failed. See stack trace for root cause."))
    for error in errors:
        try:
            raise error
        except Exception:
            logger.exception("it cannot start")
    logger.error("without an exception")
    logger.warning("a warning", exc_info=errors[0])
    assert read_errors(file) == ["ValueError: no layer", "KeyError: 'x'", ("OSError: " + "y" * 1000)[:500]]
    late = ErrorFile(str(tmp_path / "removed" / "errors"))  # the front end has removed the folder
    late.emit(logging.makeLogRecord({"exc_info": (ValueError, ValueError("late"), None)}))
    assert not (tmp_path / "removed").exists()
