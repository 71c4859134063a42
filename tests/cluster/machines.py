"""Several Ray nodes on this machine, and the application deployed on them from its YAML file."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray._private.authentication import authentication_token_setup
from ray.cluster_utils import Cluster
from ray.serve.schema import ServeDeploySchema

from deployments.cli.client import free_port
from tests.e2e.live import PATIENT_PROXIES, eventually, on_all
from tests.served_engine import START_S

APP = "loraretriever"
_IMPORT_PATH = "deployments.app:build_app"
_ADDRESS = "127.0.0.{}"  # one per node; Ray 2.60 replaces 127.0.0.1 by the machine's external address
_ROOT = Path(__file__).parent.parent.parent
_FILE = Path(__file__).with_name("serve.yaml")
_CPUS: dict[str, Any] = {"num_cpus": 4}  # Ray starts this many processes before they are needed
_SOONER = {
    "RAY_preload_python_modules": "deployments.serve_import",  # by those processes, while others start
    "RAY_health_check_period_ms": "500",  # a node is dead after five failed checks; Ray's own period is 3 s
    "RAY_worker_niceness": "0",  # as in the manifests; with Ray's own, 15, replicas starve beside other processes
}
_ACCELERATORS: dict[str, Any] = {"num_cpus": 0, "resources": {"accelerator": 2}}


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that accepts requests."""

    pid: int
    node_id: str

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def kill_engine(self) -> None:
        """Kill the processes that the replica's engine has started, and leave the replica's own."""
        for child in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()


class Machines:
    """The nodes: the head, which has the proxy and no replica, two with CPUs, two or more with accelerators."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, *, num_accelerators: int = 2) -> None:
        """Prepare the nodes. `settings`: changes of the YAML file's `args`, by dotted names."""
        self._kinds = (_CPUS, _CPUS, *[_ACCELERATORS] * num_accelerators)
        self._file = folder / "serve.yaml"
        config = yaml.safe_load(_FILE.read_text())
        port = free_port("127.0.0.1")
        config["http_options"]["port"] = port
        self.url = f"http://127.0.0.1:{port}"
        for name, value in settings.items():
            *path, last = name.split(".")
            args = config["applications"][0]["args"]
            for part in path:
                args = args[part]
            args[last] = value
        scalings: dict[str, Any] = config["applications"][0]["args"]
        self._sizes = {
            name.partition("_")[0].capitalize(): args.get("autoscaling_config", {}).get(
                "min_replicas", args.get("num_replicas", 1)
            )
            for name, args in scalings.items()
            if name.endswith("_scaling")
        }
        self._file.write_text(yaml.safe_dump(config))

    def start(self) -> None:
        """Start the nodes. Return when the application is ready."""
        head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": _ADDRESS.format(2)}
        head |= {"no_monitor": True, "include_log_monitor": False}  # nobody adds machines or reads logs
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._addresses = map(_ADDRESS.format, count(3))
        self._nodes = {self._add(kind): kind for kind in self._kinds}
        self._cluster.wait_for_nodes(timeout=START_S)
        ray.init(address=self._cluster.address, log_to_driver=False)
        self._deploy()
        eventually(self.is_ready, within_s=START_S)

    def _add(self, kind: Mapping[str, Any]) -> Any:
        return self._cluster.add_node(wait=False, node_ip_address=next(self._addresses), **kind)

    def replace_dead_nodes(self) -> None:
        """Start a node of the same kind for each that was killed. Ray starts nodes in the main thread only."""
        for node in self._nodes.keys() - self._cluster.worker_nodes:
            kind = self._nodes.pop(node)
            self._nodes[self._add(kind)] = kind

    def _deploy(self) -> None:
        """Do as `serve run` does with the file, without a process that imports Serve first."""
        config = ServeDeploySchema.model_validate(yaml.safe_load(self._file.read_text()))
        serve.start(config.proxy_location, config.http_options.model_dump())
        serve.context._get_global_client().deploy_apps(config)

    def deploy_with(self, user_config: Mapping[str, Any], *, import_path: str = _IMPORT_PATH, **args: Any) -> None:
        """Deploy the YAML file again, with this `user_config` of the Ingress, this code and these changes of `args`."""
        config = yaml.safe_load(self._file.read_text())
        config["applications"][0]["import_path"] = import_path
        config["applications"][0]["deployments"] = [{"name": "Ingress", "user_config": user_config}]
        config["applications"][0]["args"] |= args
        self._file.write_text(yaml.safe_dump(config))
        serve.context._get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))

    def stop(self) -> None:
        """Kill every process of every node, including the head."""
        if ray.is_initialized():
            self._kill_replicas(None)
            ray.shutdown()
            serve.context._disconnect()  # Ray 2.60 confuses a dead cluster's controller with the next one's
        self._cluster.shutdown()

    def is_ready(self) -> bool:
        """Return whether every expected replica accepts requests and the HTTP proxy answers."""
        if any(len(self.replicas(name)) < size for name, size in self._sizes.items()):
            return False
        return httpx.get(f"{self.url}/ready", timeout=120).status_code == 200

    async def until_full(self, *deployments: str) -> None:
        """Return once all replicas of these deployments accept requests; of all deployments if none is named."""
        async with asyncio.timeout(START_S):
            while any(len(self.replicas(name)) < self._sizes[name] for name in deployments or self._sizes):
                await asyncio.sleep(0.05)

    async def until_replaced(self, before: Mapping[str, set[Replica]]) -> None:
        """Return once every deployment has all of its replicas, and none of these.

        While Serve builds a new version of the application, it shows no replica for a moment.
        """
        async with asyncio.timeout(2 * START_S):  # they are replaced one after the other
            while True:
                now = self.all_replicas()
                if all(len(now[name]) >= size and not now[name] & before[name] for name, size in self._sizes.items()):
                    return
                await asyncio.sleep(0.05)

    def all_replicas(self) -> dict[str, set[Replica]]:
        """Return the replicas that accept requests, by deployment."""
        return {name: set(self.replicas(name)) for name in self._sizes}

    def replicas(self, deployment: str) -> list[Replica]:
        """Return the replicas of a deployment that accept requests. Serve notices a death only at its next check."""
        details = serve.context._get_global_client().get_serve_details()
        found = details["applications"].get(APP, {}).get("deployments", {}).get(deployment, {}).get("replicas", [])
        running = [Replica(item["pid"], item["node_id"]) for item in found if item["state"] == "RUNNING"]
        return [replica for replica in running if _is_alive(replica.pid)]

    def kill(self, deployment: str) -> None:
        """Kill the oldest replica with SIGKILL."""
        self.replicas(deployment)[0].kill()

    def kill_engine(self, deployment: str) -> None:
        """Kill the oldest replica's engine with SIGKILL, where it has processes of its own."""
        self.replicas(deployment)[0].kill_engine()

    def kill_all(self, deployment: str) -> None:
        """Kill all replicas with SIGKILL."""
        for replica in self.replicas(deployment):
            replica.kill()

    def kill_node_of(self, deployment: str) -> None:
        """Kill all processes of one node that has a replica of the deployment."""
        victim = self.replicas(deployment)[0].node_id
        [node] = [node for node in self._cluster.worker_nodes if node.node_id == victim]
        self._kill_replicas(victim)
        self._cluster.remove_node(node, allow_graceful=False)

    def _kill_replicas(self, node_id: str | None) -> None:
        """Kill the replicas on this node, or all replicas."""
        for replica in set[Replica]().union(*self.all_replicas().values()):
            if node_id in (None, replica.node_id):
                replica.kill()

    def on_all(self, deployment: str, method: str, *args: Any) -> list[Any]:
        return on_all(APP, deployment, method, *args)


@contextmanager
def own_ray() -> Iterator[None]:
    """Put Ray's files, and its record of this machine's cluster, into a separate folder with a short path."""
    folder = tempfile.mkdtemp(prefix="lr-")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_TMPDIR": folder, **PATIENT_PROXIES, **_SOONER}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(_ROOT), prepend=os.pathsep)  # replicas import the tests' own applications
        authentication_token_setup.enable_token_auth_by_default()
        authentication_token_setup.ensure_token_if_auth_enabled()
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
