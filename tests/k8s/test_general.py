"""General mistakes in manifests are found, by the schemas and by the checks of privileges and names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests.k8s import general, schemas
from tests.k8s.manifests import Manifests
from tests.k8s.mistakes import Mistake, container, name_of, pod_spec, spec

WRONG_FIELDS = [
    Mistake("unknown key", lambda m: m.cluster.update(enableInTreeAutoscalling=True), "enableInTreeAutoscalling"),
    Mistake("no token", lambda m: m.cluster["authOptions"].update(mode="disabled"), "'token' was expected"),
    Mistake("unknown key in a pod", lambda m: container(m).update(livenesProbe={}), "livenesProbe"),
    Mistake("unknown key in the head", lambda m: m.head.spec.update(volume=[]), "volume"),
    Mistake("wrong type", lambda m: spec(m, "Service", "loraretriever-redis").update(ports={}), "not of type 'array'"),
    Mistake("unknown kind", lambda m: m.named("Service", "loraretriever-redis").update(kind="Servise"), "Servise"),
]
WRONG_RIGHTS = [
    Mistake("root", lambda m: pod_spec(m)["securityContext"].update(runAsNonRoot=False), "may run as root"),
    Mistake("other user", lambda m: pod_spec(m)["securityContext"].update(runAsUser=2000), "the image's user"),
    Mistake("API token", lambda m: pod_spec(m).pop("automountServiceAccountToken"), "a token of the Kubernetes API"),
    Mistake("root files", lambda m: container(m)["securityContext"].pop("readOnlyRootFilesystem"), "can be written"),
    Mistake("other version", lambda m: container(m).update(image="loraretriever-cuda:0.0.9"), "0.0.9"),
    Mistake("other volume", lambda m: container(m)["volumeMounts"][0].update(name="x"), "there is no volume x"),
    Mistake(
        "token of the store's account",
        lambda m: m.named("ServiceAccount", "loraretriever").pop("automountServiceAccountToken"),
        "service account loraretriever: its token is mounted",
        overlay="gpu-s3",
    ),
]


@pytest.mark.parametrize(
    ("mistake", "problems"),
    [*((each, schemas.problems) for each in WRONG_FIELDS), *((each, general.problems) for each in WRONG_RIGHTS)],
    ids=lambda value: name_of(value) if isinstance(value, Mistake) else "",
)
def test_a_mistake_is_found(
    mistake: Mistake, problems: Callable[[Manifests], Iterable[str]], rendered: Callable[[str], Manifests]
) -> None:
    mistake.is_found_by(problems, rendered)
