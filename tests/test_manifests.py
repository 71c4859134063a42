"""k8s/*.yaml name only what exists in the code."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.app import build_app
from deployments.config import AppConfig
from deployments.proxy import CALLBACK, CALLBACK_VARIABLE

MANIFESTS = sorted((Path(__file__).parent.parent / "k8s").glob("*.yaml"))


def ray_services() -> list[dict[str, Any]]:
    documents = [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]
    return [document for document in documents if document["kind"] == "RayService"]


def test_serve_turns_args_into_the_builders_config() -> None:
    assert inspect.signature(build_app).parameters["args"].annotation is AppConfig


def test_there_is_a_ray_service() -> None:
    assert ray_services()


@pytest.mark.parametrize("service", ray_services(), ids=lambda service: service["metadata"]["name"])
def test_the_serve_config_is_valid_and_its_application_exists(service: dict[str, Any]) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert config.applications
    for application in config.applications:
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert AppConfig.model_validate(application.args).store_uri


@pytest.mark.parametrize("service", ray_services(), ids=lambda service: service["metadata"]["name"])
def test_the_cluster_runs_the_pinned_ray(service: dict[str, Any]) -> None:
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__


@pytest.mark.parametrize("service", ray_services(), ids=lambda service: service["metadata"]["name"])
def test_a_worker_pod_is_large_enough_for_each_deployment(service: dict[str, Any]) -> None:
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    config = AppConfig.model_validate(args)
    needed = max(
        scaling.num_cpus
        for scaling in (config.ingress_scaling, config.retriever_scaling, config.store_scaling, config.worker_scaling)
    )
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        assert float(container["resources"]["requests"]["cpu"]) >= needed


@pytest.mark.parametrize("service", ray_services(), ids=lambda service: service["metadata"]["name"])
def test_the_proxy_of_every_node_bounds_headers(service: dict[str, Any]) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert {"name": CALLBACK_VARIABLE, "value": CALLBACK} in container["env"]
