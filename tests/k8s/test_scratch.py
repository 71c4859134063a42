"""Writable root file systems, and scratch volumes without a size, are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s import scratch
from tests.k8s.manifests import Document, Manifests
from tests.k8s.mistakes import Mistake, container, name_of, pod_spec


def head(manifests: Manifests) -> Document:
    return manifests.cluster["headGroupSpec"]["template"]["spec"]


def volume(spec: Document, name: str) -> Document:
    [found] = [volume for volume in spec["volumes"] if volume["name"] == name]
    return found


def unmount(container: Document, path: str) -> None:
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["mountPath"] != path]


def call_sessions_otherwise(manifests: Manifests) -> None:
    volume(head(manifests), "ray-logs")["name"] = "sessions"
    [mount] = [m for m in head(manifests)["containers"][0]["volumeMounts"] if m["mountPath"] == "/tmp/ray"]
    mount["name"] = "sessions"


MISTAKES = [
    Mistake(
        "GPU pod",
        lambda m: container(m)["securityContext"].update(readOnlyRootFilesystem=False),
        "gpu: its root file system can be written",
    ),
    Mistake(
        "head",
        lambda m: head(m)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
        "head: its root file system can be written",
    ),
    Mistake(
        "autoscaler",
        lambda m: m.cluster["autoscalerOptions"]["securityContext"].pop("readOnlyRootFilesystem"),
        "autoscaler: its root file system can be written",
    ),
    Mistake(
        "redis",
        lambda m: m.pods[-1].container["securityContext"].pop("readOnlyRootFilesystem"),
        "loraretriever-redis: its root file system can be written",
    ),
    Mistake("no size", lambda m: volume(pod_spec(m), "tmp").update(emptyDir={}), "gpu: volume tmp has no sizeLimit"),
    Mistake("no size on the head", lambda m: volume(head(m), "ray-logs").update(emptyDir={}), "head: volume ray-logs"),
    Mistake(
        "folder of the node",
        lambda m: pod_spec(m)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "volume host is a folder of the node",
    ),
    Mistake("no room for uploads", lambda m: unmount(container(m, "cpu"), "/tmp"), "cpu: /tmp is not on a volume"),
    Mistake("no room for sessions", lambda m: unmount(container(m), "/tmp/ray"), "gpu: /tmp/ray is not on a volume"),
    Mistake(
        "no room for the autoscaler",
        lambda m: unmount(m.cluster["autoscalerOptions"], "/tmp"),
        "autoscaler: /tmp is not on a volume",
    ),
    Mistake("sessions under another name", call_sessions_otherwise, "KubeRay would add an unlimited volume ray-logs"),
    Mistake("home in the image", lambda m: container(m)["env"].pop(0), "gpu: HOME is not in a folder"),
    Mistake(
        "less room than uploads take",
        lambda m: m.change_args(max_upload_total_bytes=4 << 30),
        "cpu: /tmp must be larger than twice max_upload_total_bytes",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(scratch.problems, rendered)
