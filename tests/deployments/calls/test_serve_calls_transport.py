"""The transport of calls between replicas."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import grpc
import pytest

from deployments.calls.serve_calls import bypass_http_proxy
from deployments.cli.client import free_port


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set `http_proxy` to a port without a listener."""
    for name in ("https_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    monkeypatch.setenv("grpc_proxy", "to be restored")
    monkeypatch.delenv("grpc_proxy")
    yield


async def is_reached(within_s: float) -> bool:
    """Return whether a new channel reaches a gRPC server of this process."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.wait_for(channel.channel_ready(), within_s)
    except TimeoutError:
        return False
    finally:
        await server.stop(None)
    return True


def test_calls_to_replicas_bypass_an_http_proxy(dead_proxy: None) -> None:
    assert not asyncio.run(is_reached(0.5)), "gRPC ignores the proxy anyway: bypass_http_proxy is not needed"
    bypass_http_proxy()
    assert asyncio.run(is_reached(20))


def test_an_explicit_grpc_proxy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "grpc_proxy"
    monkeypatch.setenv(name, "http://gate:3128")
    bypass_http_proxy()
    assert os.environ[name] == "http://gate:3128"
