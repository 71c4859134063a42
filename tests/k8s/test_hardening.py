"""What is found of rights and images."""

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
    Mistake("autoscaler's privileges", lambda m: m.cluster["autoscalerOptions"].pop("securityContext"), "autoscaler"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(hardening.problems, rendered)
