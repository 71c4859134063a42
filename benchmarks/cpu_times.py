"""The CPU times of a local server's processes and of this one, from /proc."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

CLIENT, RAY = "client", "Ray's own"
_REPLICA = re.compile(r"^ray::ServeReplica:[^:]+:(\w+)")
_SERVE = {"ray::ServeController": "Serve's controller", "ray::ProxyActor": "Serve's proxy"}
_RAY = "/raylet", "/gcs_server", "/log_monitor.py", "/monitor.py", "dashboard/agent.py", "runtime_env/agent/main.py"


def process_kind(command: str) -> str | None:
    """Return the deployment or the part of Ray that this command line is, or None for other processes."""
    if replica := _REPLICA.match(command):
        return replica.group(1)
    for start, name in _SERVE.items():
        if command.startswith(start):
            return name
    words = command.split()[:3]
    return RAY if any(word.endswith(name) for word in words for name in _RAY) else None


def cpu_ms(processes: Path = Path("/proc")) -> Counter[str]:
    """Return the CPU time so far of each kind of process in ms, with this process as the client."""
    found: Counter[str] = Counter()
    tick_ms = 1000 // os.sysconf("SC_CLK_TCK")
    for folder in processes.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]  # in user and in system mode
        except OSError:
            continue  # the process has ended
        kind = CLIENT if int(folder.name) == os.getpid() else process_kind(command)
        if kind is not None:
            found[kind] += tick_ms * sum(map(int, times))
    return found
