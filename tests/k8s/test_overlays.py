"""Each overlay and each mixture of components: built, and without a problem that any check knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.k8s import hardening, placement, references, schemas, serving
from tests.k8s.manifests import Manifests, quantity
from tests.k8s.rendering import ALL, K8S, build

CHECKS = (schemas, references, serving, placement, hardening)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_wrong(name: str, check: Callable, rendered: Callable[[str], Manifests]) -> None:
    assert list(check.problems(rendered(name))) == []


def test_the_root_is_the_overlay_that_runs_anywhere(kubectl: str, rendered: Callable[[str], Manifests]) -> None:
    assert build(kubectl, K8S).documents == rendered("cpu-pvc").documents


@pytest.mark.parametrize("name", ALL)
def test_gpu_pods_are_there_where_workers_take_gpus(name: str, rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered(name)
    assert ("gpu" in [pod.name for pod in manifests.workers]) == (manifests.config.worker_scaling.num_gpus == 1)


def test_images_are_renamed_in_every_pod(kubectl: str, tmp_path: Path, rendered: Callable[[str], Manifests]) -> None:
    """README's way to another registry."""
    documents = rendered("gpu-s3").documents
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(documents))
    images = [{"name": f"loraretriever-{kind}", "newName": f"mine/{kind}", "newTag": "7"} for kind in ("cpu", "cuda")]
    kustomization = {"kind": "Kustomization", "resources": ["all.yaml"], "images": images}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    pods = build(kubectl, tmp_path).pods
    assert {pod.container["image"] for pod in pods if pod.is_ray} == {"mine/cpu:7", "mine/cuda:7"}


def _listed() -> Iterator[str]:
    for path in K8S.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        patches = [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
        for entry in [*kustomization.get("resources", []), *patches]:
            yield str((path.parent / entry).resolve())


def test_every_file_is_part_of_an_installation() -> None:
    files = {str(path) for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml"}
    applied_by_hand = {str(K8S / "fetch-model" / "job.yaml")}
    assert files - set(_listed()) == applied_by_hand


def test_the_job_that_fetches_a_model_fits_the_claim_and_the_image(rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered("gpu-s3")
    manifests.documents.append(yaml.safe_load((K8S / "fetch-model" / "job.yaml").read_text()))
    assert [problem for check in CHECKS for problem in check.problems(manifests)] == []
    job = manifests.pods[-1]
    assert manifests.config.base_model in job.container["args"][0]
    _, volume = job.volume_at(manifests.config.base_model)
    assert volume["persistentVolumeClaim"]["claimName"] == "loraretriever-models"


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("4", 4), (1, 1), ("1Gi", 2**30), ("2k", 2000), ("1.5G", 1.5e9)]
)
def test_quantities(text: str | int, number: float) -> None:
    assert quantity(text) == number
