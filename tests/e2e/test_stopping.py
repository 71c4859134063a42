"""A server that is asked to stop answers the requests in progress first."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from subprocess import Popen

import httpx
import pytest

from tests.cluster.scaling_app import is_ready, serving, settings_of, streaming, until

NUM_STREAMS = 12
SOON = 100  # tokens for each stream, in about a second
TOO_LATE = 12_000  # these take longer than a stopping server waits


async def stop_during_streams(url: str, server: Popen[bytes], max_tokens: int) -> list[tuple[int, str] | BaseException]:
    """Return what each stream ends with: tokens and finish reason, or an error."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(streaming(client, max_tokens, event)) for event in begun]
        await asyncio.gather(*[event.wait() for event in begun])
        server.send_signal(signal.SIGTERM)
        ended = await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.to_thread(until, lambda: not is_ready(url))
    return ended


@pytest.mark.parametrize("max_tokens", [SOON, TOO_LATE])
def test_answers_in_progress_have_some_seconds_to_end(tmp_path: Path, max_tokens: int) -> None:
    settings = settings_of(tmp_path, min_workers=1, max_workers=1)
    with serving(tmp_path, settings, os.environ) as (url, server):
        ended = asyncio.run(stop_during_streams(url, server, max_tokens))
        assert server.wait(60) == 0
    is_late = "stopped before all requests were answered" in (tmp_path / "server.log").read_text()
    assert is_late == (max_tokens == TOO_LATE)
    if is_late:
        assert all(isinstance(end, httpx.TransportError) for end in ended), ended
    else:
        assert ended == [(SOON, "length")] * NUM_STREAMS
