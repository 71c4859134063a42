"""Wrong keys and types are found in each kind of document."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s import schemas
from tests.k8s.manifests import Manifests
from tests.k8s.mistakes import Mistake, container, name_of, policy, spec

MISTAKES = [
    Mistake(
        "rayservice: wrong key", lambda m: m.cluster.update(enableInTreeAutoscalling=True), "enableInTreeAutoscalling"
    ),
    Mistake("rayservice: wrong type", lambda m: m.group("gpu").update(maxReplicas="4"), "'4' is not of type 'integer'"),
    Mistake(
        "rayservice: no authentication",
        lambda m: m.cluster["authOptions"].update(mode="disabled"),
        "'token' was expected",
    ),
    Mistake(
        "rayservice: unknown upgrade",
        lambda m: m.ray_service["spec"]["upgradeStrategy"].update(type="Rolling"),
        "'Rolling' is not one of",
    ),
    Mistake(
        "rayservice: start parameter as a number",
        lambda m: m.group("cpu")["rayStartParams"].update({"num-cpus": 4}),
        "4 is not of type 'string'",
    ),
    Mistake(
        "rayservice: unknown start parameter",
        lambda m: m.group("cpu")["rayStartParams"].update(num_cpus="4"),
        "num_cpus",
    ),
    Mistake("pods: wrong key", lambda m: container(m).update(livenesProbe={}), "livenesProbe"),
    Mistake(
        "pods: wrong type",
        lambda m: container(m)["ports"][0].update(containerPort="serve"),
        "'serve' is not of type 'integer'",
    ),
    Mistake("head: wrong key", lambda m: m.cluster["headGroupSpec"]["template"]["spec"].update(volume=[]), "volume"),
    Mistake(
        "claim: wrong key", lambda m: spec(m, "PersistentVolumeClaim", "loraretriever-pool").update(size="1Gi"), "size"
    ),
    Mistake("policy: wrong key", lambda m: policy(m, "clients").update(ingres=[]), "ingres"),
    Mistake(
        "budget: wrong key",
        lambda m: spec(m, "PodDisruptionBudget", "loraretriever-cpu").update(minAvailabel=1),
        "minAvailabel",
    ),
    Mistake("redis: wrong key", lambda m: spec(m, "StatefulSet", "loraretriever-redis").update(replica=1), "replica"),
    Mistake(
        "service: wrong type",
        lambda m: spec(m, "Service", "loraretriever-redis").update(ports={}),
        "{} is not of type 'array'",
    ),
    Mistake(
        "service account: wrong type",
        lambda m: m.named("ServiceAccount", "loraretriever").update(automountServiceAccountToken="no"),
        "'no' is not of type 'boolean'",
        overlay="gpu-s3",
    ),
    Mistake(
        "pod monitor: wrong key",
        lambda m: spec(m, "PodMonitor", "loraretriever").update(podMetricEndpoints=[]),
        "podMetricEndpoints",
    ),
    Mistake(
        "alerts: wrong key", lambda m: spec(m, "PrometheusRule", "loraretriever")["groups"][0].update(rule=[]), "rule"
    ),
    Mistake("unknown kind", lambda m: m.named("Service", "loraretriever-redis").update(kind="Servise"), "Servise"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(schemas.problems, rendered)


def test_every_kind_has_a_mistake(rendered: Callable[[str], Manifests]) -> None:
    """A new kind of document needs its own mistake."""
    kinds = {document["kind"] for overlay in ("gpu-pvc", "gpu-s3") for document in rendered(overlay).documents}
    caught = set()
    for mistake in MISTAKES:
        manifests = rendered(mistake.overlay)
        right = [document["kind"] + str(document) for document in manifests.documents]
        mistake.change(manifests)
        caught |= {
            d["kind"] for d, before in zip(manifests.documents, right, strict=True) if d["kind"] + str(d) != before
        }
    assert kinds <= caught
