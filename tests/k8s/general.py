"""Checks that any Kubernetes linter makes, and those of names that no manifest contains: images and secrets."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping

from ray._common.ray_constants import LOGGING_ROTATE_BACKUP_COUNT, LOGGING_ROTATE_BYTES

from tests.k8s.image import IMAGE, ROOT, instructions
from tests.k8s.manifests import Manifests, Pod, quantity

README = (ROOT / "k8s" / "README.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
_FIXED_IMAGE = re.compile(r":[0-9]+\.[0-9]+\.[0-9]+(-[a-z0-9.-]+)?$|@sha256:[0-9a-f]{64}$")
_SECRET = re.compile(r"kubectl create secret generic (\S+)(.*)")
_SECRET_KEY = re.compile(r"--from-(?:file|literal)=([^=\s]+)")


def secrets_made_by_hand() -> Mapping[str, set[str]]:
    """Return (name, keys) of the secrets that README asks to create, because no manifest contains them."""
    found: dict[str, set[str]] = {}
    for name, options in _SECRET.findall(README):
        found.setdefault(name, set()).update(_SECRET_KEY.findall(options))
    return found


def problems(manifests: Manifests) -> Iterator[str]:
    for pod in manifests.pods:
        yield from (f"{pod.name}: {problem}" for problem in (*_rights(pod), *_names(manifests, pod)))
        if pod.is_ray:
            yield from (f"{pod.name}: {problem}" for problem in _log_problems(pod))
        if pod.is_ray or "loraretriever" in pod.container["image"]:
            yield from (f"{pod.name}: {problem}" for problem in _image_problems(manifests, pod))
    for account in manifests.of_kind("ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"service account {account['metadata']['name']}: its token is mounted in every container"


def _rights(pod: Pod) -> Iterator[str]:
    """Check Kubernetes' pod security level `restricted`, and that nothing but sized volumes can be written."""
    own, container = pod.spec.get("securityContext", {}), pod.container.get("securityContext", {})
    if own.get("runAsNonRoot") is not True:
        yield "it may run as root"
    if own.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "its system calls are not filtered"
    if container.get("allowPrivilegeEscalation") is not False:
        yield "it may gain privileges"
    if container.get("capabilities") != {"drop": ["ALL"]}:
        yield "it keeps capabilities"
    if container.get("readOnlyRootFilesystem") is not True:
        yield "its root file system can be written"
    if "serviceAccountName" not in pod.spec and pod.spec.get("automountServiceAccountToken") is not False:
        yield "every container of it has a token of the Kubernetes API"
    for volume in pod.spec.get("volumes", []):
        if "hostPath" in volume or "sizeLimit" not in volume.get("emptyDir", {"sizeLimit": ""}):
            yield f"volume {volume['name']} is a folder of the node or has no sizeLimit"


def _log_problems(pod: Pod) -> Iterator[str]:
    """Check that the logs fit the volume: those of ten processes, and of four replicas that were replaced ten times."""
    _, volume = pod.volume_at("/tmp/ray")
    files = 1 + int(pod.variables.get("RAY_ROTATION_BACKUP_COUNT", LOGGING_ROTATE_BACKUP_COUNT))
    num_bytes = files * int(pod.variables.get("RAY_ROTATION_MAX_BYTES", LOGGING_ROTATE_BYTES))
    if (10 + 4 * 10) * num_bytes > quantity(volume["emptyDir"]["sizeLimit"]):
        yield "the logs of its processes may fill their volume, and Kubernetes evicts it"


def _names(manifests: Manifests, pod: Pod) -> Iterator[str]:
    """Check that volumes, claims and secrets exist."""
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | pod.claim_templates
    for mount in pod.container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"there is no volume {mount['name']}"
    for volume in pod.spec.get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in manifests.names("PersistentVolumeClaim"):
            yield f"there is no claim {claim}"
    for variable in pod.container.get("env", []):
        key = variable.get("valueFrom", {}).get("secretKeyRef")
        if key is not None and key["key"] not in secrets_made_by_hand().get(key["name"], set()):
            yield f"README does not say how to make {key['key']} of the secret {key['name']}"


def _image_problems(manifests: Manifests, pod: Pod) -> Iterator[str]:
    """Check that the pod has this version's image, and the user that the image is made for."""
    engines = {config.worker.engine for config in manifests.config.by_model.values()}
    on_gpu = "vllm" if "vllm" in engines else "cuda"
    wanted = f"loraretriever-{on_gpu if pod.requests('nvidia.com/gpu') else 'cpu'}:{VERSION}"
    if pod.container["image"] != wanted:
        yield f"its image is {pod.container['image']}, not {wanted}"
    if not _FIXED_IMAGE.search(pod.container["image"]):
        yield f"its image {pod.container['image']} names no exact version and no digest"
    [user] = [i.rest for i in instructions((IMAGE / "Dockerfile").read_text()) if i.keyword == "USER"]
    if pod.spec["securityContext"].get("runAsUser") != int(user.partition(":")[0]):
        yield f"it does not run as the image's user {user}"
