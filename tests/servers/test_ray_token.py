"""Access without a token to the ports of a running server, and to a cluster without authentication."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import grpc
import httpx
import psutil
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

from deployments.auth.private_files import sessions_folder
from tests.servers.started import TOKEN, Started, in_home

# One method of each gRPC server of Ray and Serve.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.serve.ASGIService/HandleRequest",
)
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
# The port of its dashboard's agent is any free one, for which it need not wait.
OPEN_CLUSTER = """
import functools, sys, ray
from ray._private import parameter
parameter.RayParams = functools.partial(parameter.RayParams, dashboard_agent_listen_port=0)
context = ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
CHECK = """
import sys, ray
from deployments.auth.ray_token import require_token_mode
from deployments.errors import RayUnauthenticated

ray.init(sys.argv[1], log_to_driver=False)
require_token_mode(allow_unauthenticated=False)

@ray.remote
def check():
    require_token_mode(allow_unauthenticated=False)

try:
    ray.get(check.remote())
except RayUnauthenticated as refusal:
    print("refused:", refusal)
"""
BATCH = """
import os
os.umask(0o022)
from deployments.batch.dataset import cluster
from ray._private.authentication.authentication_utils import is_token_auth_enabled

with cluster(1, None, 1, allow_unauthenticated=False):
    print(is_token_auth_enabled())
"""


def listening(server: psutil.Process) -> dict[int, str]:
    """Return the name of the process by port, for all ports that listen on all interfaces."""
    found = {}
    for process in (server, *server.children(recursive=True)):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip in ("::", "0.0.0.0"):
                found[connection.laddr.port] = process.name()
    return found


def all_ports(started: Started) -> set[int]:
    """Return the ports on which the server's processes listen, on any interface."""
    server = psutil.Process(started.process.pid)
    connections = [one for each in (server, *server.children(recursive=True)) for one in each.net_connections("tcp")]
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def statuses(port: int) -> set[grpc.StatusCode]:
    """Return the status of calls without a token; UNAVAILABLE if no gRPC server listens."""
    codes = set()
    with closing(grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)])) as channel:
        for method in METHODS:
            call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
            try:
                call(b"", timeout=20)
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as exc:
                codes.add(exc.code())
    return codes


def open_to_others(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.stat().st_mode & 0o077]


def test_a_server_requires_the_token_on_every_port_and_writes_private_files(started: Started) -> None:
    ports = listening(psutil.Process(started.process.pid))
    answered = {port: statuses(port) for port in ports}
    metrics = [port for port, codes in answered.items() if codes == {grpc.StatusCode.UNAVAILABLE}]  # no gRPC
    guarded = {port: codes for port, codes in answered.items() if port not in metrics}
    assert all(codes == REFUSED for codes in guarded.values()), {ports[port]: answered[port] for port in guarded}
    assert sum(ports[port].startswith("ray::ServeReplica") for port in guarded) == 8  # two per deployment
    assert len(guarded) >= 14
    assert DEFAULT_DASHBOARD_AGENT_LISTEN_PORT not in all_ports(started)  # a second server's Ray would wait for it
    assert 1 <= len(metrics) <= 3  # two have fixed numbers, which another local Ray may use
    assert all(httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200 for port in metrics)
    sessions = sessions_folder(in_home(started.folder, ""), os.geteuid())
    assert stat.S_IMODE((started.folder / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert stat.S_IMODE(sessions.parent.stat().st_mode) == 0o700
    logs = list((sessions / "session_latest" / "logs" / "serve").glob("replica_*.log"))
    assert len(logs) >= 4
    pool = list((started.folder / "pool").rglob("*"))
    assert pool != []
    assert open_to_others([*logs, *pool]) == []


def test_an_offline_run_starts_ray_in_token_mode_with_private_files(short_folder: Path) -> None:
    home = in_home(short_folder, "disabled")
    run = subprocess.run(
        [sys.executable, "-c", BATCH], env=home, capture_output=True, text=True, timeout=240, check=False
    )
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
    sessions = sessions_folder(home, os.geteuid())
    assert (sessions / "session_latest").exists()
    assert open_to_others([short_folder / ".ray" / "auth_token", sessions.parent]) == []


def test_processes_of_a_cluster_without_token_mode_are_refused(short_folder: Path) -> None:
    """The driver is in token mode, which such a cluster accepts too. Every replica checks its process as it starts."""
    command = [sys.executable, "-c", OPEN_CLUSTER]
    outlet = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=outlet, stdout=outlet, text=True, env=in_home(short_folder, "disabled")
    ) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        run = subprocess.run(
            [sys.executable, "-c", CHECK, address],
            env=in_home(short_folder, "token") | {"RAY_AUTH_TOKEN": TOKEN},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        cluster.communicate("")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("refused:") and "Ray runs without token" in run.stdout, run.stdout + run.stderr
