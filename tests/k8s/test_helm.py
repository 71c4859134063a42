"""The Helm chart, rendered by Helm itself: the same application as kustomize's, and values that are checked."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import serving
from tests.k8s.general import VERSION
from tests.k8s.manifests import Document, Manifests
from tests.k8s.network import egress_rules
from tests.k8s.rendering import K8S

CHART = K8S / "helm" / "loraretriever"
VALUES = {
    "cpu-pvc": (),
    "gpu-s3": ("values-gpu-s3",),
    "gpu-s3-vllm": ("values-gpu-s3", "values-gpu-s3-vllm"),
    "gpu-s3-models": ("values-gpu-s3-models",),
}
OUTSIDE = {
    "gpu": {
        "pod": {
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"},
            "tolerations": [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
                {"key": "dedicated", "operator": "Equal", "value": "loraretriever", "effect": "NoSchedule"},
            ],
        }
    },
    "ingress": {"enabled": True},
    "gateway": {"enabled": True},
    "modelHub": True,
    "monitoring": True,
}


def run_helm(helm: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, (helm, *arguments))), capture_output=True, text=True, timeout=120, check=False)


def template(helm: str, folder: Path, overlay: str = "cpu-pvc", values: Document | None = None) -> Manifests:
    """Return what Helm renders for an overlay's values and these."""
    (folder / "own.yaml").write_text(yaml.safe_dump(values or {}))
    files = [*(CHART / f"{name}.yaml" for name in VALUES[overlay]), folder / "own.yaml"]
    run = run_helm(helm, "template", "any-release", CHART, *[part for file in files for part in ("-f", file)])
    assert run.returncode == 0, run.stderr
    return Manifests([document for document in yaml.safe_load_all(run.stdout) if document])


def comparable(manifests: Manifests) -> dict[tuple[str, str], Any]:
    """Return the documents by kind and name, with Serve's configuration as a value instead of a text."""
    manifests.ray_service["spec"]["serveConfigV2"] = manifests.serve
    return {(document["kind"], document["metadata"]["name"]): document for document in manifests.documents}


@pytest.mark.parametrize(
    ("overlay", "values", "name", "number"),
    [
        ("cpu-pvc", {}, "cpu-pvc", 14),
        ("gpu-s3", {}, "gpu-s3", 17),
        ("gpu-s3-vllm", {}, "gpu-s3-vllm", 17),
        ("gpu-s3-models", {}, "gpu-s3-models", 17),
        ("gpu-s3", OUTSIDE, "gpu-outside", 22),
    ],
    ids=["cpu-pvc", "gpu-s3", "gpu-s3-vllm", "gpu-s3-models", "gpu-outside"],
)
def test_helm_and_kustomize_render_the_same_application(
    overlay: str,
    values: Document,
    name: str,
    number: int,
    helm: str,
    rendered: Callable[[str], Manifests],
    tmp_path: Path,
) -> None:
    by_helm = comparable(template(helm, tmp_path, overlay, values))
    assert len(by_helm) == number
    assert by_helm == comparable(rendered(name))
    claims = [document["metadata"] for (kind, _), document in by_helm.items() if kind == "PersistentVolumeClaim"]
    assert claims and all(claim["annotations"] == {"helm.sh/resource-policy": "keep"} for claim in claims)


def test_with_longer_requests_every_wait_is_longer(helm: str, tmp_path: Path) -> None:
    scaling = {"graceful_shutdown_timeout_s": 1800.5}
    settings = {"max_request_s": 1800.5, "ingress_scaling": scaling, "worker_scaling": scaling}
    assert list(serving.problems(template(helm, tmp_path, "gpu-s3", OUTSIDE | {"settings": settings}))) == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("settings.worker.nun_threads=1", "nun_threads"),
        ("settings.base_modle=x", "base_modle"),
        ("settings.max_request_s=soon", "max_request_s"),
        ("gpu.nodeSelector.a=b", "nodeSelector"),
        ("replicas=2", "replicas"),
        ("settings.store_uri=pool", "must be an absolute path"),
        ("redis.deploy=false", "redis.cidr"),
        ("networkPolicies.operator.ingress[0].from[0].a=b", "operator"),
    ],
)
def test_a_value_that_the_server_does_not_know_is_refused(value: str, problem: str, helm: str) -> None:
    run = run_helm(helm, "template", "any-release", CHART, "--set", value)
    assert run.returncode != 0 and problem in run.stderr, run.stderr


def test_values_change_images_pods_claims_and_redis(helm: str, tmp_path: Path) -> None:
    own = {
        "image": {"registry": "registry.internal/team", "tag": "7"},
        "cpu": {
            "group": {"maxReplicas": 6},
            "pod": {"priorityClassName": "high"},
            "container": {"resources": {"requests": {"memory": "24Gi"}, "limits": {"memory": "24Gi"}}},
        },
        "claims": {"pool": {"storageClassName": "nfs"}},
        "redis": {"deploy": False, "address": "redis.internal:6380", "cidr": "10.0.3.0/24"},
        "settings": {"retrieval": {"k": 5}},
    }
    manifests = template(helm, tmp_path, values=own)
    assert {pod.container["image"] for pod in manifests.pods} == {"registry.internal/team/loraretriever-cpu:7"}
    group, [pod] = manifests.group("cpu"), manifests.workers
    assert (group["minReplicas"], group["maxReplicas"], pod.spec["priorityClassName"]) == (2, 6, "high")
    assert pod.container["resources"]["requests"] == {"cpu": "4", "memory": "24Gi"}
    claim = manifests.named("PersistentVolumeClaim", "loraretriever-pool")["spec"]
    assert claim == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "nfs",
        "resources": {"requests": {"storage": "50Gi"}},
    }
    assert manifests.cluster["gcsFaultToleranceOptions"]["redisAddress"] == "redis.internal:6380"
    [rule] = egress_rules(manifests.named("NetworkPolicy", "loraretriever-to-redis"))
    assert rule.reaches("10.0.3.7") and rule.ports == {("TCP", 6380)}
    assert "loraretriever-redis" not in manifests.names("NetworkPolicy")
    assert not manifests.of_kind("StatefulSet")
    assert manifests.config.retrieval.k == 5 and manifests.config.retrieval.encoder_threads == 1


def test_values_change_policies_budgets_and_single_images(helm: str, tmp_path: Path) -> None:
    peers = [{"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "default"}}}]}]
    images = {"registry.internal/cpu@sha256:0b", "registry.internal/redis:7"}
    own = {
        "networkPolicies": {"loraretriever-operator": {"ingress": peers}},
        "redis": {"image": "registry.internal/redis:7"},
        "cpu": {"group": {"minReplicas": 1}, "container": {"image": "registry.internal/cpu@sha256:0b"}},
    }
    manifests = template(helm, tmp_path, "gpu-s3", own)
    assert manifests.named("NetworkPolicy", "loraretriever-operator")["spec"]["ingress"] == peers
    assert manifests.names("PodDisruptionBudget") == {"loraretriever-gpu"}
    assert images < {pod.container["image"] for pod in manifests.pods}


def test_a_folder_that_is_written_as_a_uri_is_on_the_claim_too(helm: str, tmp_path: Path) -> None:
    as_path = template(helm, tmp_path, values={"settings": {"store_uri": "/data/pool"}})
    as_uri = template(helm, tmp_path, values={"settings": {"store_uri": "file:///data/pool"}})
    [pod] = as_uri.workers
    mount, volume = pod.volume_at("/data/pool")
    assert mount["mountPath"] == "/data/pool" and volume["persistentVolumeClaim"]["claimName"] == "loraretriever-pool"
    assert "envFrom" not in pod.container and "serviceAccountName" not in pod.spec
    assert as_path.named("PersistentVolumeClaim", "loraretriever-pool")
    assert len(as_uri.documents) == len(as_path.documents)


def test_a_role_is_an_annotation_of_the_service_account(helm: str, tmp_path: Path) -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/pool"}
    manifests = template(helm, tmp_path, "gpu-s3", {"serviceAccountAnnotations": role})
    assert manifests.named("ServiceAccount", "loraretriever")["metadata"]["annotations"] == role


def test_the_chart_has_the_servers_version_and_is_complete_in_a_package(helm: str, tmp_path: Path) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == VERSION
    lint = run_helm(helm, "lint", "--strict", CHART)
    assert lint.returncode == 0, lint.stdout
    packaged = run_helm(helm, "package", CHART, "--destination", tmp_path)
    assert packaged.returncode == 0, packaged.stderr
    [archive] = tmp_path.glob("*.tgz")
    with tarfile.open(archive) as files:
        sizes = {member.name: member.size for member in files if member.isfile()}
    linked = [name for name in sizes if name.startswith("loraretriever/files/")]
    assert len(linked) == 15 and min(sizes[name] for name in linked) > 100


def test_a_chart_without_its_links_says_how_to_get_them(helm: str, tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart, symlinks=True)
    for link in (chart / "files").iterdir():
        target = link.readlink()
        link.unlink()
        link.write_text(str(target))
    run = run_helm(helm, "template", "any-release", chart)
    assert run.returncode != 0 and "clone the repository with git" in run.stderr, run.stderr
