"""A server that is asked to stop answers the requests in progress first."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
import yaml

from deployments.cli.client import free_port
from tests.cluster.scaling_app import SETTLE_S, serving, settings_of, streaming, until

NUM_STREAMS = 12
NUM_TOKENS = 2000  # of each stream: longer than the server takes to notice a signal, less than it waits


async def stop_during_streams(url: str, server: Popen[bytes]) -> list[tuple[int, str]]:
    """Return the tokens and the finish reason of each stream."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(streaming(client, NUM_TOKENS, event)) for event in begun]
        await asyncio.wait_for(asyncio.gather(*[event.wait() for event in begun]), SETTLE_S)
        server.send_signal(signal.SIGTERM)
        await asyncio.wait_for(refusing(httpx.URL(url)), SETTLE_S)
        assert not any(stream.done() for stream in streams), "connections were accepted until the streams had ended"
        return list(await asyncio.gather(*streams))


async def refusing(url: httpx.URL) -> None:
    """Return when no more connections are accepted."""
    with suppress(ConnectionRefusedError):
        while True:
            _, writer = await asyncio.open_connection(url.host, url.port)
            writer.close()
            await asyncio.sleep(0.02)


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


def test_answers_in_progress_have_some_seconds_to_end(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, min_workers=1, max_workers=1)
    with serving(tmp_path, settings, os.environ) as (url, server):
        log = tmp_path / "server.log"
        until(lambda: "ready after" in log.read_text())
        assert asyncio.run(stop_during_streams(url, server)) == [(NUM_TOKENS, "length")] * NUM_STREAMS
        assert server.wait(60) == 0
    assert "stopped before all requests were answered" not in log.read_text()
