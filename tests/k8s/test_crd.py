"""KubeRay's own schema, in the file named by LORARETRIEVER_RAYSERVICE_CRD."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import Document, Manifests
from tests.k8s.rendering import ALL
from tests.k8s.schemas import OWN_SCHEMAS, schema_problems, strict

CRD_VARIABLE = "LORARETRIEVER_RAYSERVICE_CRD"


def served_schema(crd: Document) -> Document:
    """Return the OpenAPI schema of the version that is served and stored."""
    [version] = [v for v in crd["spec"]["versions"] if v["served"] and v["storage"]]
    return version["schema"]["openAPIV3Schema"]


@pytest.fixture(scope="module")
def crd() -> Document:
    path = os.environ.get(CRD_VARIABLE)
    if not path:
        pytest.skip(f"{CRD_VARIABLE} names no file ray.io_rayservices.yaml of KubeRay")
    return served_schema(yaml.load(Path(path).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@pytest.mark.parametrize("name", ALL)
def test_kuberay_takes_the_ray_service(name: str, crd: Document, rendered: Callable[[str], Manifests]) -> None:
    assert list(schema_problems(rendered(name).ray_service, strict(crd))) == []


def test_the_projects_schema_allows_only_fields_of_kuberay(crd: Document) -> None:
    own = OWN_SCHEMAS["RayService"]
    assert list(_unknown(own["properties"]["spec"], crd["properties"]["spec"], "spec")) == []


def _unknown(own: Document, theirs: Document, where: str) -> Iterator[str]:
    for name, part in own.get("properties", {}).items():
        if name not in theirs.get("properties", {}) and "additionalProperties" not in theirs:
            yield f"{where}.{name}"
        else:
            yield from _unknown(part, theirs.get("properties", {}).get(name, {}), f"{where}.{name}")
    if "items" in own:
        yield from _unknown(own["items"], theirs["items"], f"{where}[]")
