"""The Ingress of `loraretriever serve` listens itself: clients that leave, restarts, and the proxy next to it."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import httpx
import pytest

from deployments.cli.local_server import APP_NAME, Server
from gpu_worker.config import PACKAGED_MODEL
from tests.e2e.live import abandon, completion, eventually, processes_with
from tests.served_engine import START_S
from tests.soak import Scale

_LONG = completion(PACKAGED_MODEL, "The sea is", 1500)


def test_requests_of_clients_that_leave_end(url: str) -> None:
    for stream in (False, True):
        asyncio.run(abandon(url, APP_NAME, _LONG | {"stream": stream}, 4))


def test_the_application_answers_behind_the_proxy_too(server: Server) -> None:
    assert server.url != server.proxy_url
    for address in (server.url, server.proxy_url):
        assert httpx.get(f"{address}/-/healthz").text == "success"
        answer = httpx.post(f"{address}/v1/completions", json=completion(PACKAGED_MODEL, "The sea is", 4), timeout=60)
        assert answer.status_code == 200 and len(answer.headers.get_list("x-request-id", split_commas=True)) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_an_ingress_that_fails_is_replaced_at_the_same_address(number: signal.Signals, url: str, scale: Scale) -> None:
    if number == signal.SIGSTOP and not scale.is_full:
        pytest.skip("Serve kills it after a minute and a half: in make soak")
    body = completion(PACKAGED_MODEL, "The sea is", 4)
    text = json.dumps(httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])
    [ingress] = processes_with("ray::ServeReplica:loraretriever:Ingress")
    began = time.monotonic()
    ingress.send_signal(number)

    def answer() -> str:
        try:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=120).text
        except httpx.TransportError as exc:
            return str(exc)

    eventually(lambda: text in answer(), within_s=START_S)
    scale.record("seconds without an answer", time.monotonic() - began)
    assert not ingress.is_running()
