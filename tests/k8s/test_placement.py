"""Replicas that do not fit their pods are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.k8s import placement
from tests.k8s.manifests import Manifests
from tests.k8s.mistakes import Mistake, container, name_of, spec

MISTAKES = [
    Mistake(
        "replicas on the head", lambda m: m.cluster["headGroupSpec"]["rayStartParams"].pop("num-cpus"), "on the head"
    ),
    Mistake(
        "pods too few at the least",
        lambda m: m.change_args(worker_scaling={"autoscaling_config": {"min_replicas": 3, "max_replicas": 4}}),
        "Worker: no room at the minimum",
    ),
    Mistake(
        "pods too few at the most",
        lambda m: m.change_args(worker_scaling={"autoscaling_config": {"min_replicas": 2, "max_replicas": 5}}),
        "Worker: no room at the maximum",
    ),
    Mistake(
        "pods too small",
        lambda m: m.change_args(worker_scaling={"ray_actor_options": {"num_cpus": 5}}),
        "a Worker fits no pod",
    ),
    Mistake(
        "resource that no pod offers",
        lambda m: m.change_args(store_scaling={"ray_actor_options": {"resources": {"cpu": 1}}}),
        "Store: no room",
    ),
    Mistake(
        "guest on a GPU pod",
        lambda m: m.change_args(retriever_scaling={"ray_actor_options": {"num_cpus": 1}}),
        "Retriever may take the CPUs of GPU pods",
    ),
    Mistake("no GPU for a worker", lambda m: m.cluster["workerGroupSpecs"].pop(), "a Worker fits no pod"),
    Mistake(
        "two GPUs for one worker",
        lambda m: [part.update({"nvidia.com/gpu": 2}) for part in container(m)["resources"].values()],
        "a pod has 2 GPUs",
    ),
    Mistake(
        "GPU that is not limited",
        lambda m: container(m)["resources"]["limits"].pop("nvidia.com/gpu"),
        "GPUs are limited",
    ),
    Mistake(
        "memory that is not limited", lambda m: container(m)["resources"]["limits"].pop("memory"), "memory is limited"
    ),
    Mistake(
        "CPUs Ray does not know",
        lambda m: m.group("cpu")["rayStartParams"].update({"num-cpus": "8"}),
        "Ray counts other CPUs",
    ),
    Mistake("replicas outside the bounds", lambda m: m.group("cpu").update(replicas=1), "outside"),
    Mistake(
        "threads of the whole machine",
        lambda m: m.change_args(worker={"num_threads": None}),
        "left to the machine's cores",
    ),
    Mistake("threads above the pod's CPUs", lambda m: m.change_args(worker={"num_threads": 8}), "8 threads"),
    Mistake(
        "budget as a share",
        lambda m: spec(m, "PodDisruptionBudget", "loraretriever-cpu").update(minAvailable="50%"),
        "only a number",
    ),
    Mistake(
        "budget that forbids every drain",
        lambda m: spec(m, "PodDisruptionBudget", "loraretriever-gpu").update(minAvailable=2),
        "ever be drained",
    ),
    Mistake("no budget", lambda m: m.remove("PodDisruptionBudget", "loraretriever-gpu"), "no disruption budget"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_a_mistake_is_found(mistake: Mistake, rendered: Callable[[str], Manifests]) -> None:
    mistake.is_found_by(placement.problems, rendered)


def test_rays_own_autoscaler_reads_the_groups(rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered("gpu-s3")
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": manifests.cluster}
    read = _derive_autoscaling_config_from_ray_cr(cluster)
    assert read["idle_timeout_minutes"] == 11
    nodes = read["available_node_types"]
    assert {name: (node["min_workers"], node["max_workers"]) for name, node in nodes.items()} == {
        "headgroup": (0, 0),
        "cpu": (2, 4),
        "gpu": (2, 4),
    }
    sizes = {name: (node["resources"]["CPU"], node["resources"].get("GPU", 0)) for name, node in nodes.items()}
    assert nodes["cpu"]["resources"]["cpu_pod"] == 1
    assert sizes == {"headgroup": (0, 0), "cpu": (4, 0), "gpu": (4, 1)}
