"""Checks of users and privileges of containers."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

from tests.k8s.image import IMAGE, ROOT, instructions
from tests.k8s.manifests import Manifests, Pod

_TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"  # read by Ray's autoscaler
_FIXED_IMAGE = re.compile(r":[0-9]+\.[0-9]+\.[0-9]+(-[a-z0-9.-]+)?$|@sha256:[0-9a-f]{64}$")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def image_user() -> int:
    """Return the numeric user of the image."""
    [user] = [i.rest for i in instructions((IMAGE / "Dockerfile").read_text()) if i.keyword == "USER"]
    return int(user.partition(":")[0])


def problems(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        yield from (f"{pod.name}: {problem}" for problem in _rights(pod))
        if pod.is_ray or "loraretriever" in pod.container["image"]:
            yield from (f"{pod.name}: {problem}" for problem in _image_problems(pod, _engine(manifests)))
        if not _FIXED_IMAGE.search(pod.container["image"]):
            yield f"{pod.name}: its image {pod.container['image']} names no exact version and no digest"
    autoscaler = manifests.cluster["autoscalerOptions"].get("securityContext", {})
    if autoscaler.get("allowPrivilegeEscalation") is not False:
        yield "autoscaler: it may gain privileges"
    yield from _token_problems(manifests)


def _rights(pod: Pod) -> Iterator[str]:
    """Check Kubernetes' pod security level `restricted`."""
    own, container = pod.spec.get("securityContext", {}), pod.container.get("securityContext", {})
    if own.get("runAsNonRoot") is not True:
        yield "it may run as root"
    if own.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "its system calls are not filtered"
    if container.get("allowPrivilegeEscalation") is not False:
        yield "it may gain privileges"
    if container.get("capabilities") != {"drop": ["ALL"]}:
        yield "it keeps capabilities"
    if (
        "serviceAccountName" not in pod.spec  # such an account mounts no token by default: see _token_problems
        and pod.spec.get("automountServiceAccountToken") is not False
    ):
        yield "every container of it has a token of the Kubernetes API"
    secrets = [v["name"] for v in pod.container.get("env", []) if "secretKeyRef" in v.get("valueFrom", {})]
    command = " ".join([*pod.container.get("command", []), *pod.container.get("args", [])])
    yield from (f"{name} is on its command line" for name in secrets if f"$({name})" in command)


def _token_problems(manifests: Manifests) -> Iterator[str]:
    """Check that only the autoscaler can call the Kubernetes API."""
    with_token = {
        volume["name"]
        for volume in manifests.head.spec.get("volumes", [])
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
    }
    mounts = manifests.cluster["autoscalerOptions"].get("volumeMounts", [])
    if not any(mount["name"] in with_token and mount["mountPath"] == _TOKEN_FOLDER for mount in mounts):
        yield "autoscaler: it has no token of the Kubernetes API"
    for mount in manifests.head.container.get("volumeMounts", []):
        if mount["name"] in with_token:
            yield "head: Ray's own container has a token of the Kubernetes API"
    for account in manifests.of_kind("ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"service account {account['metadata']['name']}: its token is mounted in every container"


def _engine(manifests: Manifests) -> str:
    engine: str = manifests.args.get("worker", {}).get("engine", "native")
    return engine


def _image_problems(pod: Pod, engine: str) -> Iterator[str]:
    on_gpu = "vllm" if engine == "vllm" else "cuda"
    kind = on_gpu if pod.requests("nvidia.com/gpu") else "cpu"
    if pod.container["image"] != f"loraretriever-{kind}:{VERSION}":
        yield f"its image is {pod.container['image']}, not loraretriever-{kind}:{VERSION}"
    if pod.spec["securityContext"].get("runAsUser") != image_user():
        yield f"it does not run as the image's user {image_user()}"
    if pod.spec["securityContext"].get("fsGroup") != pod.spec["securityContext"].get("runAsGroup"):
        yield "its volumes belong to another group than its own"
