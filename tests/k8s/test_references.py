"""Names, labels and ports without a target are found."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.k8s import references
from tests.k8s.manifests import Manifests
from tests.k8s.mistakes import Mistake, container, name_of, pod_spec, policy, spec
from tests.k8s.rendering import K8S


def rename_mount(manifests: Manifests) -> None:
    container(manifests)["volumeMounts"][0]["name"] = "cash"


MISTAKES = [
    Mistake(
        "missing claim",
        lambda m: m.remove("PersistentVolumeClaim", "loraretriever-pool"),
        "there is no claim loraretriever-pool",
    ),
    Mistake(
        "claim without a mount",
        lambda m: m.cluster["workerGroupSpecs"].pop(),
        "claim loraretriever-models is mounted by no pod",
    ),
    Mistake("mount without a volume", rename_mount, "there is no volume cash"),
    Mistake("volume without a mount", rename_mount, "volume tmp is not mounted"),
    Mistake(
        "unknown secret",
        lambda m: [
            volume["secret"].update(secretName="keys")
            for volume in pod_spec(m, "cpu")["volumes"]
            if volume["name"] == "keys"
        ],
        "the secret keys",
    ),
    Mistake(
        "unknown key of a secret",
        lambda m: m.cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"].update(
            key="pass"
        ),
        "without the key pass",
    ),
    Mistake(
        "unknown config map",
        lambda m: pod_spec(m)["volumes"].append({"name": "c", "configMap": {"name": "settings"}}),
        "there is no config map settings",
    ),
    Mistake(
        "unknown environment secret",
        lambda m: container(m, "cpu")["envFrom"][0]["secretRef"].update(name="s3"),
        "the secret s3",
        overlay="gpu-s3",
    ),
    Mistake(
        "missing service account",
        lambda m: m.remove("ServiceAccount", "loraretriever"),
        "there is no service account loraretriever",
        overlay="gpu-s3",
    ),
    Mistake("probe of a port that is not there", lambda m: container(m)["ports"].pop(), "asks a port dashboard-agent"),
    Mistake(
        "probe of a path without an answer",
        lambda m: container(m)["livenessProbe"]["httpGet"].update(path="/healthz"),
        "/healthz",
    ),
    Mistake("no probe", lambda m: container(m).pop("readinessProbe"), "it has no readinessProbe"),
    Mistake(
        "wrong redis address",
        lambda m: m.cluster["gcsFaultToleranceOptions"].update(redisAddress="redis:6379"),
        "there is no service redis",
    ),
    Mistake(
        "wrong redis port",
        lambda m: m.cluster["gcsFaultToleranceOptions"].update(redisAddress="loraretriever-redis:6380"),
        "no port 6380",
    ),
    Mistake(
        "service: selector mismatch",
        lambda m: spec(m, "Service", "loraretriever-redis").update(selector={"app": "redis"}),
        "selects no pod",
    ),
    Mistake(
        "service: wrong target port",
        lambda m: spec(m, "Service", "loraretriever-redis")["ports"][0].update(targetPort="tcp"),
        "no port tcp",
    ),
    Mistake(
        "redis: selector mismatch",
        lambda m: spec(m, "StatefulSet", "loraretriever-redis")["selector"].update(matchLabels={"app": "redis"}),
        "does not select its own pods",
    ),
    Mistake(
        "policy: selector mismatch",
        lambda m: policy(m, "drivers")["podSelector"]["matchLabels"].update({"ray.io/node-type": "master"}),
        "selects no pod",
    ),
    Mistake(
        "policy: wrong port",
        lambda m: policy(m, "clients")["ingress"][0]["ports"][0].update(port=8001),
        "nothing listens on 8001",
    ),
    Mistake(
        "policy: unknown peer",
        lambda m: policy(m, "clients")["ingress"][0]["from"][0]["podSelector"].update(matchLabels={"client": "yes"}),
        "client=yes",
    ),
    Mistake(
        "budget: selector mismatch",
        lambda m: spec(m, "PodDisruptionBudget", "loraretriever-cpu")["selector"]["matchLabels"].update(
            {"ray.io/group": "cpus"}
        ),
        "selects no pod",
    ),
    Mistake(
        "pod monitor: wrong port",
        lambda m: spec(m, "PodMonitor", "loraretriever")["podMetricsEndpoints"][0].update(port="metric"),
        "has no port metric",
    ),
    Mistake(
        "pod monitor: selector mismatch",
        lambda m: spec(m, "PodMonitor", "loraretriever")["selector"].update(matchLabels={"app": "ray"}),
        "selects no pod",
    ),
    Mistake(
        "spread by other pods' labels",
        lambda m: m.group("cpu")["template"]["metadata"].update(labels={"app": "x"}),
        "labels it does not have",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(references.problems, rendered)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"k8s/[a-z0-9-]+(?:/[A-Za-z0-9.-]+)+", references.README))))
def test_readme_names_existing_files(path: str) -> None:
    assert (K8S.parent / path).exists()
