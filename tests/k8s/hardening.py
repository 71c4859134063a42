"""What runs, as whom, with which rights."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

from tests.k8s.image import IMAGE, ROOT, instructions
from tests.k8s.manifests import Manifests, Pod

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def image_user() -> int:
    """The numeric user that the image runs as."""
    [user] = [i.rest for i in instructions((IMAGE / "Dockerfile").read_text()) if i.keyword == "USER"]
    return int(user.partition(":")[0])


def problems(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        yield from (f"{pod.name}: {problem}" for problem in _rights(pod))
        if pod.is_ray or "loraretriever" in pod.container["image"]:
            yield from (f"{pod.name}: {problem}" for problem in _image_problems(pod))
    autoscaler = manifests.cluster["autoscalerOptions"].get("securityContext", {})
    if autoscaler.get("allowPrivilegeEscalation") is not False:
        yield "autoscaler: it may gain privileges"


def _rights(pod: Pod) -> Iterator[str]:
    """Kubernetes' pod security level `restricted`."""
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
        pod.name != "head"
        and "serviceAccountName" not in pod.spec
        and pod.spec.get("automountServiceAccountToken") is not False
    ):
        yield "it has a token of the Kubernetes API that it does not need"


def _image_problems(pod: Pod) -> Iterator[str]:
    kind = "cuda" if pod.requests("nvidia.com/gpu") else "cpu"
    if pod.container["image"] != f"loraretriever-{kind}:{VERSION}":
        yield f"its image is {pod.container['image']}, not loraretriever-{kind}:{VERSION}"
    if pod.spec["securityContext"].get("runAsUser") != image_user():
        yield f"it does not run as the image's user {image_user()}"
    if pod.spec["securityContext"].get("fsGroup") != pod.spec["securityContext"].get("runAsGroup"):
        yield "its volumes belong to another group than its own"
