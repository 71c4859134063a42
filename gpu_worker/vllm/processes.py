"""The processes that vLLM starts, which must not outlive the process that started the engine.

vLLM ends them when its front end shuts down. A front end that is killed, or ends itself, shuts nothing down; its engine
would keep the device's memory, which the front end's successor needs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

_PERIOD_S = 1.0
_LONGEST_ERROR = 500  # characters
_POINTER = "root cause"  # in errors of vLLM that only follow another one


class ErrorFile(logging.Handler):
    """Appends the exceptions that a process of vLLM logs to a file, so that its front end can name them.

    Nothing is written once the front end has removed the file's folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        text = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]
        if _POINTER in text:
            return
        with suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(text) + "\n")


def read_errors(path: Path) -> list[str]:
    """Return the different errors in the file of an ErrorFile, in the order of their first appearance."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list(dict.fromkeys(json.loads(line) for line in lines))


def kill_descendants() -> None:
    """Kill all processes that this process, or one of those, has started."""
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the ids of the process's children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        if (found := _parent(int(path.name))) is not None:
            children.setdefault(found, []).append(int(path.name))
    reached = [pid]
    for ancestor in reached:
        reached += children.get(ancestor, [])
    return reached[1:]


def end_with(pid: int) -> None:
    """End this process, and its parent, soon after the process `pid` has ended, its parent or its parent's parent."""
    parent = os.getppid()
    has_core_between = parent != pid

    def watch() -> None:
        while _parent(parent) == pid if has_core_between else os.getppid() == pid:
            time.sleep(_PERIOD_S)
        if has_core_between and os.getppid() == parent:
            with suppress(ProcessLookupError):
                os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-front-end", daemon=True).start()


def _parent(pid: int) -> int | None:
    """Return the id of the process's parent, or None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])
