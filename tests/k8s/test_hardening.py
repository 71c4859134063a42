"""Mistakes in privileges and images are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.k8s import hardening
from tests.k8s.manifests import Manifests
from tests.k8s.mistakes import Mistake, container, name_of, pod_spec

MISTAKES = [
    Mistake("another version's image", lambda m: container(m).update(image="loraretriever-cuda:0.0.9"), "0.0.9"),
    Mistake(
        "CPU image on a GPU",
        lambda m: container(m).update(image=container(m, "cpu")["image"]),
        "not loraretriever-cuda",
    ),
    Mistake("root", lambda m: pod_spec(m)["securityContext"].update(runAsNonRoot=False), "may run as root"),
    Mistake(
        "another user than the image's",
        lambda m: pod_spec(m)["securityContext"].update(runAsUser=2000),
        "the image's user",
    ),
    Mistake("volumes of another group", lambda m: pod_spec(m)["securityContext"].update(fsGroup=0), "another group"),
    Mistake(
        "privileges",
        lambda m: container(m)["securityContext"].update(allowPrivilegeEscalation=True),
        "may gain privileges",
    ),
    Mistake(
        "capabilities",
        lambda m: container(m)["securityContext"].update(capabilities={"drop": ["NET_RAW"]}),
        "keeps capabilities",
    ),
    Mistake("system calls", lambda m: pod_spec(m)["securityContext"].pop("seccompProfile"), "not filtered"),
    Mistake("API token", lambda m: pod_spec(m).pop("automountServiceAccountToken"), "a token of the Kubernetes API"),
    Mistake(
        "API token in all of the head",
        lambda m: m.cluster["headGroupSpec"]["template"]["spec"].pop("automountServiceAccountToken"),
        "head: every container of it has a token",
    ),
    Mistake(
        "API token next to Ray",
        lambda m: m.head.container["volumeMounts"].append({"name": "kubernetes-api", "mountPath": "/api"}),
        "head: Ray's own container has a token",
    ),
    Mistake(
        "autoscaler without a token",
        lambda m: m.cluster["autoscalerOptions"]["volumeMounts"].pop(),
        "autoscaler: it has no token",
    ),
    Mistake(
        "token of the store's account",
        lambda m: m.named("ServiceAccount", "loraretriever").pop("automountServiceAccountToken"),
        "service account loraretriever: its token is mounted",
        overlay="gpu-s3",
    ),
    Mistake(
        "password on the command line",
        lambda m: m.pods[-1].container["args"].append("--requirepass $(REDISCLI_AUTH)"),
        "REDISCLI_AUTH is on its command line",
    ),
    Mistake("tag that moves", lambda m: m.pods[-1].container.update(image="redis:7.4"), "names no exact version"),
    Mistake("no tag", lambda m: m.pods[-1].container.update(image="redis"), "names no exact version"),
    Mistake("autoscaler's privileges", lambda m: m.cluster["autoscalerOptions"].pop("securityContext"), "autoscaler"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(hardening.problems, rendered)
