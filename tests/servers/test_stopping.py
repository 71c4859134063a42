"""A server that is asked to stop answers the requests in progress first."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments.cli.client import free_port
from tests.cluster.scaling_app import serving, settings_of
from tests.e2e.live import SETTLE_S, command_of, eventually, eventually_equal
from tests.served_engine import START_S
from tests.servers.started import Started, untraced
from tests.soak import Scale

ASKED = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "ignore_eos": True}
BODY = json.dumps(ASKED).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"


async def stop_during_a_request(url: httpx.URL, server: Popen[bytes]) -> tuple[bytes, dict[str, Any]]:
    """Interrupt all processes while the server waits for a request's body. Return the answer's first line and body."""
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(HEAD + b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % len(BODY))
    assert b"100 Continue" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SETTLE_S)
    os.killpg(server.pid, signal.SIGINT)
    await asyncio.wait_for(refusing(url), SETTLE_S)
    writer.write(BODY)
    answer = await asyncio.wait_for(reader.read(), SETTLE_S)
    writer.close()
    assert answer, "the connection was closed without an answer"
    head, _, content = answer.partition(b"\r\n\r\n")
    return head.splitlines()[0], json.loads(content)


async def refusing(url: httpx.URL) -> None:
    """Return when no more connections are accepted."""
    with suppress(ConnectionError):
        while True:
            _, writer = await asyncio.open_connection(url.host, url.port)
            writer.close()
            await asyncio.sleep(0.02)


def started_log(folder: Path) -> str:
    """Return all that the server has printed, once it has printed the last line of its start."""
    log = folder / "server.log"
    eventually(lambda: re.search(r"^logs: .*\n", log.read_text(), re.MULTILINE) is not None)
    return log.read_text()


def test_a_signal_to_all_processes_stops_the_server(scale: Scale, tmp_path: Path) -> None:
    """`timeout` and systemd send theirs to the processes of Ray too, which may end before requests are answered."""
    if not scale.is_full:
        pytest.skip("it needs a server of its own: in make soak")
    settings = settings_of(tmp_path, min_workers=1, max_workers=1)
    with serving(tmp_path, settings, untraced(), leads_group=True) as (url, process):
        assert httpx.post(f"{url}/v1/completions", json=ASKED, timeout=START_S).status_code == 200
        server = Started(url, process, tmp_path)
        printed, processes = started_log(tmp_path), psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        lines = check_end(server, processes, printed)
    # Ray's control plane may end before this process has read its signal. Then a thread of Ray's core prints this line.
    lines = [line for line in lines if "task_manager.cc" not in line or "Failed to push error to driver" not in line]
    assert lines in ([], ["stopped before all requests were answered"])


def check_end(server: Started, processes: list[psutil.Process], printed: str) -> list[str]:
    """Check that the server and its processes end. Return the lines that it has printed since `printed`."""
    assert server.process.wait(60) == 0
    _, left = psutil.wait_procs(processes, timeout=30)
    assert left == [] and processes_of_session(server.process.pid) == []
    return started_log(server.folder).removeprefix(printed).splitlines()


def test_a_server_with_the_settings_of_make_serve_gives_equal_answers(started: Started) -> None:
    """They start a server, and their temperature of 0 is used where a request names none."""
    answers = [httpx.post(f"{started.url}/v1/completions", json=ASKED, timeout=START_S).json() for _ in range(2)]
    [first, second] = [answer["choices"][0]["text"] for answer in answers]
    assert len(first) == ASKED["max_tokens"] and first == second


def test_ctrl_c_answers_the_request_in_progress_and_prints_no_line_of_rays(started: Started) -> None:
    """A terminal sends its signal to the processes of Ray too."""
    printed = started_log(started.folder)
    [logs] = re.findall(r"^logs: +(/.*/session_[^/]*/logs/serve)$", printed, re.MULTILINE)
    assert len(list(Path(logs).glob("replica_*.log"))) >= 4
    check_processes(psutil.Process(started.process.pid))
    processes = psutil.Process(started.process.pid).children(recursive=True)
    first_line, answer = asyncio.run(stop_during_a_request(httpx.URL(started.url), started.process))
    assert first_line.endswith(b"200 OK"), answer
    assert answer["usage"]["completion_tokens"] == 8
    assert check_end(started, processes, printed) == []


def check_processes(server: psutil.Process) -> None:
    """Check that no needless process runs, that only those that compute hold torch, and no replica pandas."""
    eventually_equal(lambda: len(replicas_of(server)), 4)  # a worker that was removed has ended
    commands, with_torch, with_pandas = list[str](), list[str](), list[str]()
    for process in (server, *server.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            commands.append(command_of(process))
            maps = " ".join(each.path for each in process.memory_maps())
            with_torch += [commands[-1]] * ("libtorch" in maps)
            with_pandas += [commands[-1]] * ("/pandas/" in maps)
    for needless in ("dashboard.py", "monitor.py", "ProxyActor"):
        assert not [command for command in commands if needless in command]
    assert not [command for command in with_pandas if "ray::" in command]
    computing = ("ServeReplica:loraretriever:Worker", "ServeReplica:loraretriever:Retriever")
    assert any(computing[0] in command for command in with_torch)
    # The Retriever of a first start converts its encoder with torch.
    assert not [command for command in with_torch if not any(name in command for name in computing)]


def replicas_of(server: psutil.Process) -> list[psutil.Process]:
    return [process for process in server.children(recursive=True) if "ServeReplica" in command_of(process)]


def test_a_stop_during_the_start_leaves_no_process(tmp_path: Path) -> None:
    file, program = tmp_path / "settings.yaml", Path(sys.executable).with_name("loraretriever")
    file.write_text(yaml.safe_dump(settings_of(tmp_path, min_workers=1, max_workers=1)))
    command = [str(program), "serve", "--config", str(file), "--port", str(free_port("127.0.0.1"))]
    with Popen(command) as server:
        started = dict[int, psutil.Process]()

        def starts_replicas() -> bool:
            started.update({each.pid: each for each in psutil.Process(server.pid).children(recursive=True)})
            return any("ServeReplica" in command_of(each) for each in started.values())

        try:
            eventually(starts_replicas, within_s=START_S)
            server.send_signal(signal.SIGTERM)
            assert server.wait(START_S) == 128 + signal.SIGTERM
        finally:
            server.kill()
        _, left = psutil.wait_procs(started.values(), timeout=30)
        assert left == []


def processes_of_session(leader: int) -> list[str]:
    """Return the commands of the processes that this leader's session still has."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(command_of(process))
    return found
