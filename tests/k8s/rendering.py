"""Render k8s/ with `kubectl kustomize`: the overlays, and combinations that a reader may build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import Manifests

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-pvc", "gpu-s3", "gpu-s3-vllm", "gpu-s3-models")
# By name: components, and the overlay whose settings are used, with another store URI.
MIXTURES: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "cpu-s3": (("components/store-s3", "components/arm64", "components/cpu-only"), "cpu-pvc", "s3://my-bucket/pool"),
    "hub": (("components/store-pvc", "components/model-hub", "components/cpu-only"), "cpu-pvc", "/pool"),
    "gpu-outside": (
        (
            "components/store-s3",
            "components/gcs-redis",
            "components/gpu-type",
            "components/ingress",
            "components/gateway",
            "components/model-hub",
            "monitoring",
        ),
        "gpu-s3",
        "s3://my-bucket/loraretriever?region=eu-central-1",
    ),
    "gpu-pvc": (("components/store-pvc", "components/gcs-redis", "monitoring"), "gpu-s3", "/pool"),
}
ALL = (*OVERLAYS, *MIXTURES)
_PACKAGE = "kubernetes-client"


@pytest.fixture(scope="session")
def kubectl() -> str:
    """Return Debian's kubectl. Without it skip the test, or fail if CI_REQUIRES_KUBECTL is set."""
    executable = shutil.which("kubectl")
    if executable is None:
        missing = f"there is no kubectl: install Debian's package {_PACKAGE}"
        if os.environ.get("CI_REQUIRES_KUBECTL"):
            pytest.fail(missing)
        pytest.skip(missing)
    return executable


@pytest.fixture(scope="session")
def helm() -> str:
    """Return Helm, which `make helm` puts beside Python. Without it skip, or fail if CI_REQUIRES_HELM is set."""
    beside = Path(sys.executable).with_name("helm")
    executable = str(beside) if beside.exists() else shutil.which("helm")
    if executable is None:
        (pytest.fail if os.environ.get("CI_REQUIRES_HELM") else pytest.skip)("there is no helm: run `make helm`")
    return executable


def build(kubectl: str, folder: Path) -> Manifests:
    """Run `kubectl kustomize FOLDER`. Raises: CalledProcessError."""
    built = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60)
    return Manifests(list(yaml.safe_load_all(built.stdout)))


@pytest.fixture(scope="session")
def rendered(kubectl: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Manifests]:
    """Return a copy of the documents of an overlay or a combination."""
    copied = tmp_path_factory.mktemp("kustomize") / "k8s"
    shutil.copytree(K8S, copied)
    for name, mixture in MIXTURES.items():
        _write_mixture(copied / "overlays" / name, mixture)
    built: dict[str, Manifests] = {}

    def manifests(name: str) -> Manifests:
        if name not in built:
            built[name] = build(kubectl, copied / "overlays" / name)
        return Manifests(deepcopy(built[name].documents))

    return manifests


def _write_mixture(folder: Path, mixture: tuple[tuple[str, ...], str, str]) -> None:
    components, settings_of, store_uri = mixture
    folder.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../base"],
        "components": [f"../../{component}" for component in components],
        "patches": [{"path": "serve.yaml"}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    patch = Manifests([yaml.safe_load((folder.parent / settings_of / "serve.yaml").read_text())])
    patch.change_args(store_uri=store_uri)
    (folder / "serve.yaml").write_text(yaml.safe_dump(patch.ray_service))
