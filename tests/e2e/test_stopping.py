"""A server that is asked to stop answers the requests in progress first."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
import pytest
import yaml

from deployments.cli.client import free_port
from tests.cluster.scaling_app import SETTLE_S, is_ready, serving, settings_of, streaming, until

NUM_STREAMS = 12
SOON = 100  # tokens for each stream, in about a second
TOO_LATE = 60_000  # these take longer than a stopping server waits


async def stop_during_streams(url: str, server: Popen[bytes], max_tokens: int) -> list[tuple[int, str] | BaseException]:
    """Return what each stream ends with: tokens and finish reason, or an error."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(streaming(client, max_tokens, event)) for event in begun]
        await asyncio.wait_for(asyncio.gather(*[event.wait() for event in begun]), SETTLE_S)
        server.send_signal(signal.SIGTERM)
        ended = await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.to_thread(until, lambda: not is_ready(url))
    return ended


def test_a_stop_during_the_start_leaves_no_process(tmp_path: Path) -> None:
    file, program = tmp_path / "settings.yaml", Path(sys.executable).with_name("loraretriever")
    file.write_text(yaml.safe_dump(settings_of(tmp_path, min_workers=1, max_workers=1)))
    command = [str(program), "serve", "--config", str(file), "--port", str(free_port("127.0.0.1"))]
    with Popen(command) as server:
        started = dict[int, psutil.Process]()

        def starts_replicas() -> bool:
            started.update({each.pid: each for each in psutil.Process(server.pid).children(recursive=True)})
            return any("ServeReplica" in " ".join(each.cmdline()) for each in started.values() if each.is_running())

        until(starts_replicas)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM
        _, left = psutil.wait_procs(started.values(), timeout=30)
        assert left == []


@pytest.mark.parametrize("max_tokens", [SOON, TOO_LATE])
def test_answers_in_progress_have_some_seconds_to_end(tmp_path: Path, max_tokens: int) -> None:
    settings = settings_of(tmp_path, min_workers=1, max_workers=1)
    with serving(tmp_path, settings, os.environ) as (url, server):
        log = tmp_path / "server.log"
        until(lambda: "ready after" in log.read_text())
        ended = asyncio.run(stop_during_streams(url, server, max_tokens))
        assert server.wait(60) == 0
    if max_tokens == SOON:
        assert ended == [(SOON, "length")] * NUM_STREAMS
    else:
        assert all(isinstance(end, httpx.TransportError) for end in ended), ended
    is_late = "stopped before all requests were answered" in log.read_text()
    assert is_late == (max_tokens == TOO_LATE)
