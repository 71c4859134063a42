"""Check that root file systems are read-only, and that scratch volumes have a size."""

from __future__ import annotations

from collections.abc import Iterator

from tests.k8s import placement
from tests.k8s.manifests import Document, Manifests, Pod, quantity

_RAY_FOLDERS = ("/tmp", "/tmp/ray")
_SESSIONS = "ray-logs"  # the name that KubeRay expects


def problems(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        if pod.container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{pod.name}: its root file system can be written"
        yield from (f"{pod.name}: {problem}" for problem in _volume_problems(pod))
        if pod.is_ray:
            yield from (f"{pod.name}: {problem}" for problem in _ray_problems(pod.container, pod))
    autoscaler = manifests.cluster["autoscalerOptions"]
    if autoscaler.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
        yield "autoscaler: its root file system can be written"
    yield from (f"autoscaler: {problem}" for problem in _ray_problems(autoscaler, manifests.head))
    yield from _upload_problems(manifests)


def _volume_problems(pod: Pod) -> Iterator[str]:
    for volume in pod.spec.get("volumes", []):
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no sizeLimit"
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a folder of the node"


def _ray_problems(container: Document, pod: Pod) -> Iterator[str]:
    """Check the folders that Ray writes to: its temporary ones, and those in HOME."""
    for folder in _RAY_FOLDERS:
        names = [mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == folder]
        if not names or "emptyDir" not in pod.volume(names[0]):
            yield f"{folder} is not on a volume of the pod's own"
        elif folder == "/tmp/ray" and names != [_SESSIONS]:
            yield f"{folder} is on {names[0]}, and KubeRay would add an unlimited volume {_SESSIONS}"
    if {"name": "HOME", "value": "/tmp"} not in container.get("env", []):
        yield "HOME is not in a folder that can be written"


def _upload_problems(manifests: Manifests) -> Iterator[str]:
    """Check the size of /tmp: an upload is there twice, received by the Ingress and validated by the Store."""
    config = manifests.config
    for group, pod in zip(manifests.cluster["workerGroupSpecs"], manifests.workers, strict=True):
        if not placement.may_hold(group, pod, config.ingress_scaling):
            continue
        _, tmp = pod.volume_at("/tmp/upload")
        size = quantity(tmp.get("emptyDir", {}).get("sizeLimit", 0))
        if size <= (least := 2 * config.max_upload_total_bytes):
            yield f"{pod.name}: /tmp must be larger than twice max_upload_total_bytes ({least})"
