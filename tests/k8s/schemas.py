"""Validate documents with schemas: Kubernetes' own, and this project's for other kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import SchemaNotFoundError, ValidationError

from tests.k8s.manifests import Document, Manifests

KUBERNETES_VERSION = "1.32"
OWN_SCHEMAS = {
    kind: yaml.safe_load((Path(__file__).parent / f"{name}.schema.yaml").read_text())
    for kind, name in {
        "HTTPRoute": "http_route",
        "RayService": "rayservice",
        "PodMonitor": "pod_monitor",
        "PrometheusRule": "prometheus_rule",
    }.items()
}


def problems(manifests: Manifests) -> Iterator[str]:
    """Return the violations of a schema, unknown keys first."""
    for document in manifests.documents:
        own = OWN_SCHEMAS.get(document["kind"])
        found = _kubernetes_problems(document) if own is None else schema_problems(document, own)
        yield from (f"{document['kind']} {document['metadata']['name']}: {problem}" for problem in found)
    for name, template in _templates(manifests):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        yield from (f"pods of {name}: {problem}" for problem in _kubernetes_problems(pod))


def schema_problems(document: Document, schema: dict[str, Any]) -> Iterator[str]:
    for error in Draft202012Validator(schema).iter_errors(document):
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


def strict(schema: Document) -> Document:
    """Return a CRD's OpenAPI schema as a JSON schema that refuses unknown fields, like a strict API server.

    `x-kubernetes-*` is ignored, except where it changes the type: integer or string, and preserved unknown fields.
    """
    kept = {key: schema[key] for key in ("type", "enum", "required", "minimum", "maximum", "pattern") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if "items" in schema:
        kept["items"] = strict(schema["items"])
    if isinstance(values := schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(values)
    if "properties" in schema:
        kept["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in kept:
            kept["additionalProperties"] = False
    return kept


def _templates(manifests: Manifests) -> Iterator[tuple[str, Document]]:
    yield "head", manifests.cluster["headGroupSpec"]["template"]
    for group in manifests.cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def _kubernetes_problems(document: Document) -> Iterator[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except ValidationError as exc:
        yield f"{'.'.join(map(str, exc.path))}: {exc.message}"
    except SchemaNotFoundError as exc:
        yield exc.message
