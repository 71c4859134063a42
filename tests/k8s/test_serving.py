"""Settings that contradict the code or the pods are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s import serving
from tests.k8s.manifests import Document, Manifests
from tests.k8s.mistakes import Mistake, container, name_of, pod_spec


def mount(manifests: Manifests, group: str, name: str, source: Document, path: str) -> None:
    pod_spec(manifests, group)["volumes"].append({"name": name, **source})
    container(manifests, group)["volumeMounts"].append({"name": name, "mountPath": path})


MISTAKES = [
    Mistake("GPU that computes nothing", lambda m: m.change_args(worker={"device": "cpu"}), "worker.device is cpu"),
    Mistake("another Ray", lambda m: m.cluster.update(rayVersion="2.59.0"), "2.59.0"),
    Mistake("proxy of unbounded headers", lambda m: m.head.container["env"].clear(), "bounds no headers"),
    Mistake("unknown setting", lambda m: m.change_args(base_modell="x"), "base_modell"),
    Mistake("unknown setting of a deployment", lambda m: m.change_args(store_scaling={"replicas": 2}), "replicas"),
    Mistake("setting of the wrong type", lambda m: m.change_args(publish_paths="perhaps"), "publish_paths"),
    Mistake(
        "unknown key of Serve's options",
        lambda m: m.change_serve(http_options={"hosts": "0.0.0.0", "port": 8000}),
        "hosts",
    ),
    Mistake("unknown key of Serve", lambda m: m.change_serve(proxy_locations="EveryNode"), "proxy_locations"),
    Mistake(
        "import path that is not there", lambda m: m.change_application(import_path="deployments.app:build"), "build"
    ),
    Mistake(
        "import path of something else",
        lambda m: m.change_application(import_path="deployments.cli.client:check_free"),
        "does not take args",
    ),
    Mistake("another application's name", lambda m: m.change_application(name="app"), "'app'"),
    Mistake(
        "wrong port",
        lambda m: m.change_serve(http_options={"host": "0.0.0.0", "port": 9000}),
        "not where Serve listens",
    ),
    Mistake(
        "listens to itself alone",
        lambda m: m.change_serve(http_options={"host": "127.0.0.1", "port": 8000}),
        "not where Serve listens",
    ),
    Mistake("keys elsewhere", lambda m: m.change_args(keys_file="/etc/keys.yaml"), "on no volume of a secret"),
    Mistake(
        "keys under another name",
        lambda m: m.change_args(keys_file="/etc/loraretriever/keys/key.yaml"),
        "on no volume of a secret",
    ),
    Mistake(
        "keys where no Ingress runs",
        lambda m: mount(m, "gpu", "keys", {"secret": {"secretName": "loraretriever-keys"}}, "/etc/loraretriever/keys"),
        "gpu: it mounts the secret loraretriever-keys",
    ),
    Mistake(
        "credentials where no Store runs",
        lambda m: pod_spec(m).update(serviceAccountName="loraretriever"),
        "gpu: it has credentials of the store",
        overlay="gpu-s3",
    ),
    Mistake("no keys", lambda m: m.change_args(keys_file=None), "without keys_file"),
    Mistake("store on no volume", lambda m: m.change_args(store_uri="/data"), "on no claim"),
    Mistake("store on a volume that is read only", lambda m: m.change_args(store_uri="/models"), "on no claim"),
    Mistake(
        "bucket without credentials",
        lambda m: m.change_args(store_uri="s3://bucket/pool"),
        "nothing gives it credentials",
    ),
    Mistake("cache on no volume", lambda m: m.change_args(cache_dir="/var/cache"), "cache_dir"),
    Mistake(
        "cache larger than its volume",
        lambda m: m.change_args(disk_cache_bytes=20 << 30),
        "sizeLimit",
        overlay="gpu-s3",
    ),
    Mistake("model that is nowhere", lambda m: m.change_args(base_model="/opt/models/x"), "base_model"),
    Mistake(
        "queue of the class's default",
        lambda m: m.change_args(ingress_scaling={"max_ongoing_requests": 64}),
        "max_ongoing_requests",
    ),
    Mistake(
        "queue below the engine's",
        lambda m: m.change_args(worker={"max_waiting": 4096}),
        "max_batch_size + max_waiting",
    ),
    Mistake(
        "one replica alone",
        lambda m: m.change_args(retriever_scaling={"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}}),
        "one replica alone",
    ),
    Mistake(
        "old cluster goes too early",
        lambda m: m.ray_service["spec"].update(rayClusterDeletionDelaySeconds=60),
        "cuts requests",
    ),
    Mistake(
        "idle pods go too early",
        lambda m: m.cluster["autoscalerOptions"].update(idleTimeoutSeconds=60),
        "cuts requests",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(serving.problems, rendered)
