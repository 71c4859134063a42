"""Each overlay and each combination of components renders, and no check finds a problem in it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from gpu_worker.front.request.model_files import TEMPLATE_FILE
from tests.k8s import general, network, placement, schemas, serving
from tests.k8s.general import README
from tests.k8s.manifests import Document, Manifests
from tests.k8s.network import egress_rules
from tests.k8s.rendering import ALL, K8S, OVERLAYS, build

CHECKS = (schemas, general, serving, placement, network)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", ALL)
def test_no_check_finds_a_problem(name: str, check: Callable, rendered: Callable[[str], Manifests]) -> None:
    assert list(check.problems(rendered(name))) == []


def test_the_root_is_the_overlay_that_runs_anywhere(kubectl: str, rendered: Callable[[str], Manifests]) -> None:
    assert build(kubectl, K8S).documents == rendered("cpu-pvc").documents


def test_only_gpu_pods_of_the_vllm_overlay_have_its_image(rendered: Callable[[str], Manifests]) -> None:
    with_vllm, without = rendered("gpu-s3-vllm"), rendered("gpu-s3")
    assert (with_vllm.config.worker.engine, without.config.worker.engine) == ("vllm", "native")
    images = [{pod.name: pod.container["image"] for pod in found.workers} for found in (with_vllm, without)]
    assert images[0].pop("gpu") == "loraretriever-vllm:0.2.0" and images[1].pop("gpu") == "loraretriever-cuda:0.2.0"
    assert images[0] == images[1] != {}


@pytest.mark.parametrize("name", ALL)
def test_gpu_pods_exist_if_workers_use_gpus(name: str, rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered(name)
    num_gpus = {own.worker_scaling.num_gpus for own in manifests.config.by_model.values()}
    assert ("gpu" in [pod.name for pod in manifests.workers]) == (num_gpus == {1})


@pytest.mark.parametrize(("components", "processor"), [([], "amd64"), (["../components/arm64"], "arm64")])
def test_every_pod_with_our_image_is_on_nodes_of_one_processor(
    components: list[str], processor: str, kubectl: str, tmp_path: Path
) -> None:
    copied = tmp_path / "k8s"
    shutil.copytree(K8S, copied)
    (copied / "own").mkdir()
    own = {"kind": "Kustomization", "resources": ["../fetch-model", "../overlays/gpu-s3"], "components": components}
    (copied / "own" / "kustomization.yaml").write_text(yaml.safe_dump(own))
    pods = [pod for pod in build(kubectl, copied / "own").pods if "loraretriever" in pod.container["image"]]
    assert [pod.name for pod in pods] == ["head", "cpu", "gpu", "loraretriever-fetch-model"]
    assert {pod.spec["nodeSelector"]["kubernetes.io/arch"] for pod in pods} == {processor}


def test_one_file_names_the_registry_and_the_digest_of_every_image(kubectl: str, tmp_path: Path) -> None:
    """README describes this way to use both: all pods, the Job's included, use components/images."""
    copied = tmp_path / "k8s"
    shutil.copytree(K8S, copied)
    pinned = copied / "components" / "images" / "kustomization.yaml"
    kustomization = yaml.safe_load(pinned.read_text())
    digests = {}
    for number, image in enumerate(kustomization["images"]):
        image.pop("newTag")
        image["digest"] = digests[image["name"]] = f"sha256:{number:064x}"
        image["newName"] = f"registry.internal/{image['name']}"
    pinned.write_text(yaml.safe_dump(kustomization))
    found = set()
    for folder in (*(f"overlays/{name}" for name in OVERLAYS), "fetch-model"):
        text = subprocess.run(
            [kubectl, "kustomize", str(copied / folder)], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        found |= set(re.findall(r" image: (\S+)", text))
    assert found == {f"registry.internal/{name}@{digest}" for name, digest in digests.items()}
    assert found != set()


def _listed() -> Iterator[str]:
    for path in K8S.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        patches = [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
        for entry in [*kustomization.get("resources", []), *patches]:
            yield str((path.parent / entry).resolve())


def test_every_file_is_part_of_an_installation() -> None:
    """Those of the Helm chart are links to these."""
    files = {
        str(path) for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml" and "helm" not in path.parts
    }
    assert files - set(_listed()) == set()


def test_rays_own_autoscaler_reads_the_groups(rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered("gpu-s3")
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": manifests.cluster}
    read = _derive_autoscaling_config_from_ray_cr(cluster)
    assert read["idle_timeout_minutes"] == 11
    nodes = read["available_node_types"]
    bounds = {name: (node["min_workers"], node["max_workers"]) for name, node in nodes.items()}
    assert bounds == {"headgroup": (0, 0), "cpu": (2, 20), "gpu": (2, 4)}
    sizes = {name: (node["resources"]["CPU"], node["resources"].get("GPU", 0)) for name, node in nodes.items()}
    assert nodes["cpu"]["resources"]["cpu_pod"] == 1
    assert sizes == {"headgroup": (0, 0), "cpu": (4, 0), "gpu": (4, 1)}


def test_a_rule_for_the_model_hub_opens_the_workers(rendered: Callable[[str], Manifests]) -> None:
    [rule] = egress_rules(rendered("hub").named("NetworkPolicy", "loraretriever-model-hub"))
    assert rule.reaches("203.0.113.7") and rule.has_port("TCP", 443) and not rule.has_port("TCP", 80)


@pytest.fixture(scope="module")
def jobs(kubectl: str) -> dict[str, list[Document]]:
    return {name: build(kubectl, K8S / name).documents for name in ("fetch-model", "pool-job")}


@pytest.fixture
def fetching(jobs: dict[str, list[Document]], rendered: Callable[[str], Manifests]) -> Manifests:
    """Return the GPU overlay with the Job that fills its volume."""
    manifests = rendered("gpu-s3")
    manifests.documents += jobs["fetch-model"]
    return manifests


def test_the_job_that_fetches_a_model_fits_the_claim_and_the_image(fetching: Manifests) -> None:
    assert [problem for check in CHECKS for problem in check.problems(fetching)] == []
    job = fetching.pods[-1]
    assert {"name": "FOLDER", "value": fetching.config.base_model} in job.container["env"]
    _, volume = job.volume_at(fetching.config.base_model)
    assert volume["persistentVolumeClaim"]["claimName"] == "loraretriever-models"


def test_the_job_of_the_pool_mounts_the_claim_as_cpu_pods_do(
    jobs: dict[str, list[Document]], rendered: Callable[[str], Manifests]
) -> None:
    manifests = rendered("cpu-pvc")
    manifests.documents += jobs["pool-job"]
    assert [problem for check in CHECKS for problem in check.problems(manifests)] == []
    [cpu], job = manifests.workers, manifests.pods[-1]
    assert job.name == "loraretriever-pool" and job.volume_at("/pool") == cpu.volume_at("/pool")


def test_deleting_one_job_leaves_the_objects_of_the_other(jobs: dict[str, list[Document]]) -> None:
    fetch, pool = jobs["fetch-model"], jobs["pool-job"]
    assert len(fetch) == len(pool) == 2
    assert {document["metadata"]["name"] for document in fetch}.isdisjoint(d["metadata"]["name"] for d in pool)


NEEDED = (
    "config.json",
    "model-00001-of-00002.safetensors",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    TEMPLATE_FILE,
)
HUB = """
def snapshot_download(*arguments, **options):
    print((arguments, options))
"""


@pytest.mark.parametrize("revision", ["", "main", "v1.0", "B" * 40, "b" * 39])
def test_the_job_fetches_no_revision_that_can_move(revision: str, fetching: Manifests, tmp_path: Path) -> None:
    run = _fetch(fetching, revision, tmp_path)
    assert run.returncode == 1
    assert "40 hexadecimal digits" in run.stderr and run.stdout == ""


def test_the_job_fetches_the_commit_it_names(fetching: Manifests, tmp_path: Path) -> None:
    run = _fetch(fetching, "0b" * 20, tmp_path)
    assert run.returncode == 0, run.stderr
    arguments, options = ast.literal_eval(run.stdout)
    patterns = options.pop("allow_patterns")
    assert arguments == ("Qwen/Qwen3-8B",)
    assert options == {"revision": "0b" * 20, "local_dir": "/models/Qwen3-8B"}
    unmatched = [name for name in (*NEEDED, "model.bin") if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert unmatched == ["model.bin"], "a model without its chat template answers with another template"


def _fetch(manifests: Manifests, revision: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the Job's program with a hub that only reports its requests."""
    (folder / "huggingface_hub.py").write_text(HUB)
    container = manifests.pods[-1].container
    environment = {**manifests.pods[-1].variables, "REVISION": revision, "PYTHONPATH": str(folder)}
    command = [sys.executable, *container["command"][1:], *container["args"]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_patches_that_readme_shows_apply(kubectl: str, tmp_path: Path) -> None:
    """A patch of a missing policy or field makes kustomize fail."""
    [patches] = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if block.startswith("patches")]
    copied = tmp_path / "k8s"
    shutil.copytree(K8S, copied)
    folder = copied / "overlays" / "own"
    folder.mkdir()
    kustomization = yaml.safe_load(patches) | {"kind": "Kustomization", "resources": ["../gpu-s3"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    manifests = build(kubectl, folder)
    [peer] = manifests.named("NetworkPolicy", "loraretriever-operator")["spec"]["ingress"][0]["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "default"}
    [rule] = egress_rules(manifests.named("NetworkPolicy", "loraretriever-kubernetes-api"))
    assert rule.reaches("10.0.0.1") and not rule.reaches("203.0.113.7")
    [rule] = egress_rules(manifests.named("NetworkPolicy", "loraretriever-to-redis"))
    assert rule.reaches("10.0.3.7") and rule.has_port("TCP", 6379)
    assert len(list(egress_rules(manifests.named("NetworkPolicy", "loraretriever-object-store")))) == 2
