"""Deliberate errors in manifests that are otherwise free of problems (test_overlays.py). A check must find each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.k8s.manifests import Document, Manifests


@dataclass(frozen=True, slots=True)
class Mistake:
    """`change` makes the error in `overlay`. One of the problems found must contain `problem`."""

    name: str
    change: Callable[[Manifests], object]
    problem: str
    overlay: str = "gpu-pvc"

    def is_found_by(self, problems: Callable[[Manifests], Iterable[str]], rendered: Callable[[str], Manifests]) -> None:
        manifests = rendered(self.overlay)
        self.change(manifests)
        found = list(problems(manifests))
        assert any(self.problem in text for text in found), found


def name_of(mistake: Mistake) -> str:
    return mistake.name


def pod_spec(manifests: Manifests, group: str = "gpu") -> Document:
    return manifests.group(group)["template"]["spec"]


def container(manifests: Manifests, group: str = "gpu") -> Document:
    return pod_spec(manifests, group)["containers"][0]


def spec(manifests: Manifests, kind: str, name: str) -> Document:
    return manifests.named(kind, name)["spec"]


def policy(manifests: Manifests, name: str) -> Document:
    return spec(manifests, "NetworkPolicy", f"loraretriever-{name}")
