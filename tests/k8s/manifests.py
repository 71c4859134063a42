"""Rendered documents, and the parts of them that the checks read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from deployments.config.app import AppConfig

Document = dict[str, Any]
_UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(value: str | int | float) -> float:
    """Return a Kubernetes quantity as a number: `500m` is 0.5, `1Gi` is 2³⁰."""
    text = str(value)
    number = text.rstrip("".join({letter for unit in _UNITS for letter in unit}))
    return float(number) * _UNITS[text[len(number) :]]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod template, with the labels of its running pods."""

    name: str
    labels: Mapping[str, str]
    spec: Document
    is_ray: bool = False
    claim_templates: frozenset[str] = frozenset()

    @property
    def container(self) -> Document:
        """Return the only container. KubeRay appends its own."""
        [container] = self.spec["containers"]
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables of the container that have a fixed value."""
        return {entry["name"]: entry["value"] for entry in self.container.get("env", []) if "value" in entry}

    def requests(self, resource: str) -> float:
        return quantity(self.container["resources"]["requests"].get(resource, 0))

    def volume(self, name: str) -> Document:
        return next((volume for volume in self.spec.get("volumes", []) if volume["name"] == name), {})

    def volume_at(self, path: str) -> tuple[Document, Document]:
        """Return (mount, volume) of the deepest mount that contains `path`; empty ones if there is none."""
        place = PurePosixPath(path)
        mounts = [m for m in self.container.get("volumeMounts", []) if place.is_relative_to(m["mountPath"])]
        if not mounts:
            return {}, {}
        mount = max(mounts, key=lambda mount: len(mount["mountPath"]))
        return mount, self.volume(mount["name"])

    def is_selected_by(self, match_labels: Mapping[str, str]) -> bool:
        return match_labels.items() <= self.labels.items()


class Manifests:
    """The documents of one installation. They may be changed in place; nothing is cached."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def of_kind(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] in kinds]

    def named(self, kind: str, name: str) -> Document:
        [document] = [found for found in self.of_kind(kind) if found["metadata"]["name"] == name]
        return document

    def names(self, kind: str) -> set[str]:
        return {document["metadata"]["name"] for document in self.of_kind(kind)}

    @property
    def ray_service(self) -> Document:
        [service] = self.of_kind("RayService")
        return service

    @property
    def cluster(self) -> Document:
        return self.ray_service["spec"]["rayClusterConfig"]

    def group(self, name: str) -> Document:
        [group] = [group for group in self.cluster["workerGroupSpecs"] if group["groupName"] == name]
        return group

    @property
    def serve(self) -> Document:
        return yaml.safe_load(self.ray_service["spec"]["serveConfigV2"])

    def change_args(self, **changes: Any) -> None:
        """Change the application's args."""
        serve = self.serve
        [application] = serve["applications"]
        application["args"] |= changes
        self.ray_service["spec"]["serveConfigV2"] = yaml.safe_dump(serve)

    @property
    def args(self) -> Document:
        return self.serve["applications"][0]["args"]

    @property
    def config(self) -> AppConfig:
        return AppConfig.model_validate(self.args)

    @property
    def head(self) -> Pod:
        return _ray_pod("head", "headgroup", self.cluster["headGroupSpec"]["template"])

    @property
    def workers(self) -> list[Pod]:
        groups = self.cluster["workerGroupSpecs"]
        return [_ray_pod("worker", group["groupName"], group["template"]) for group in groups]

    @property
    def pods(self) -> list[Pod]:
        return [self.head, *self.workers, *self._other_pods()]

    def _other_pods(self) -> Iterator[Pod]:
        for document in self.of_kind("StatefulSet", "Job"):
            template, spec = document["spec"]["template"], document["spec"]
            claims = frozenset(claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", []))
            labels = template.get("metadata", {}).get("labels", {})
            yield Pod(document["metadata"]["name"], labels, template["spec"], claim_templates=claims)


def _ray_pod(node_type: str, group: str, template: Document) -> Pod:
    """Return the pod. KubeRay overwrites these two labels in any template."""
    labels = template["metadata"]["labels"] | {"ray.io/node-type": node_type, "ray.io/group": group}
    return Pod("head" if node_type == "head" else group, labels, template["spec"], is_ray=True)
