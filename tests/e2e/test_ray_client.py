"""The application through Ray Client: whole answers, and a refusal of streams, which Ray Client cannot carry."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest
import ray

from deployments.cli.client import free_port
from tests.e2e.live import eventually
from tests.served_engine import START_S

pytestmark = pytest.mark.usefixtures("scale")  # by which `make soak` finds them
SCRIPT = """
import json, sys
import ray
from ray import serve

ray.init(sys.argv[1])
handle = serve.get_app_handle("loraretriever")
request = {"model": "gemma-3-270m", "prompt": "One, two, three, four,", "temperature": 0, "max_tokens": 4}
whole = handle.generate.remote(request).result()
try:
    handle.options(stream=True).stream.remote(request)
except RuntimeError as exc:
    refused = str(exc)
print(json.dumps({"whole": whole["choices"][0]["text"], "refused": refused}))
"""


@pytest.fixture(scope="module")
def client_url(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    """A Ray Client server before the running cluster, on loopback."""
    if request.config.getoption("--scale") != "full":
        pytest.skip("it is Ray's behaviour, which changes with Ray only: in make soak")
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "ray.util.client.server", "--mode=specific-server"]
    command += [f"--address={ray.get_runtime_context().gcs_address}", "--host=127.0.0.1", f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            eventually(lambda: _listens(port), within_s=START_S)
            yield f"ray://127.0.0.1:{port}"
        finally:
            server.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ask(client_url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, client_url],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_ray_client_gets_whole_answers_and_an_error_for_streams(client_url: str, client: openai.OpenAI) -> None:
    run = ask(client_url, RAY_AUTH_MODE="token")
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.strip().splitlines()[-1])
    over_http = client.completions.create(
        model="gemma-3-270m", prompt="One, two, three, four,", temperature=0, max_tokens=4
    )
    assert said["whole"] == over_http.choices[0].text
    assert "not currently supported" in said["refused"] and "Ray Client" in said["refused"]


def test_ray_client_needs_the_clusters_token(client_url: str) -> None:
    impatient = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1"}
    run = ask(client_url, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="ab" * 32, **impatient)
    assert run.returncode != 0
    assert "ray client connection timeout" in run.stderr  # Ray 2.60's only message about a wrong token
