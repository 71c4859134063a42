"""Deliberate errors, put into manifests in which no check finds a problem (test_overlays.py): one of them must then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.k8s.manifests import Document, Manifests


@dataclass(frozen=True, slots=True)
class Mistake:
    """`change` makes it in `overlay`; one of the problems found then has `told` in it."""

    name: str
    change: Callable[[Manifests], object]
    told: str
    overlay: str = "gpu-pvc"

    def is_found_by(self, problems: Callable[[Manifests], Iterable[str]], rendered: Callable[[str], Manifests]) -> None:
        manifests = rendered(self.overlay)
        self.change(manifests)
        found = list(problems(manifests))
        assert any(self.told in problem for problem in found), found


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
