"""Check that pods have room for all replicas that Serve may place, at the minimum and at the maximum."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.config.app import AppConfig
from deployments.scaling.settings import ServeOptions
from tests.k8s.manifests import Document, Manifests, Pod


@dataclass(slots=True)
class Room:
    """Free resources of a pod."""

    left: dict[str, float]
    held: list[ServeOptions] = field(default_factory=list)

    def takes(self, scaling: ServeOptions) -> bool:
        wanted = {
            "CPU": scaling.num_cpus,
            "GPU": scaling.num_gpus,
            **scaling.root["ray_actor_options"].get("resources", {}),
        }
        if sum(other is scaling for other in self.held) >= (scaling.root.get("max_replicas_per_node") or math.inf):
            return False
        if any(amount > self.left.get(name, 0) + 1e-9 for name, amount in wanted.items()):
            return False
        self.held.append(scaling)
        self.left |= {name: self.left.get(name, 0) - amount for name, amount in wanted.items()}
        return True


def problems(manifests: Manifests) -> Iterator[str]:
    config = manifests.config
    pairs = list(zip(manifests.cluster["workerGroupSpecs"], manifests.workers, strict=True))
    if manifests.cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "replicas may be placed on the head"
    for group, pod in pairs:
        yield from (f"group {pod.name}: {problem}" for problem in _group_problems(group, pod, config))
    scalings = _scalings(config)
    for name, scaling in scalings.items():
        if scaling.root.get("max_replicas_per_node") != 1:
            yield f"{name}: the death of one node may take every replica: max_replicas_per_node is not 1"
    for bound in ("min", "max"):
        rooms = [_room(group, pod) for group, pod in pairs for _ in range(group[f"{bound}Replicas"])]
        wanted = {name: getattr(scaling, f"{bound}_replicas") for name, scaling in scalings.items()}
        yield from (f"{name}: no room at the {bound}imum" for name in _without_room(scalings, wanted, rooms))
    for group, pod in pairs:
        if pod.requests("nvidia.com/gpu"):
            guests = [
                name for name, scaling in scalings.items() if not scaling.num_gpus and may_hold(group, pod, scaling)
            ]
            yield from (f"{name} may take the CPUs of GPU pods" for name in guests)
    yield from _worker_problems(manifests, config)
    yield from _budget_problems(manifests)


def _scalings(config: AppConfig) -> dict[str, ServeOptions]:
    return {
        "Ingress": config.ingress_scaling,
        "Retriever": config.retriever_scaling,
        "Store": config.store_scaling,
        **{f"Worker of {name}": own.worker_scaling for name, own in config.by_model.items()},
    }


def _room(group: Document, pod: Pod) -> Room:
    custom = json.loads(
        group["rayStartParams"].get("resources", "'{}'")[1:-1]
    )  # in the form that Ray's autoscaler reads
    return Room({"CPU": pod.requests("cpu"), "GPU": pod.requests("nvidia.com/gpu"), **custom})


def may_hold(group: Document, pod: Pod, scaling: ServeOptions) -> bool:
    """Return whether an empty pod of the group has room for a replica."""
    return _room(group, pod).takes(scaling)


def _without_room(
    scalings: Mapping[str, ServeOptions], wanted: Mapping[str, int], rooms: Sequence[Room]
) -> Iterator[str]:
    """Place the largest replicas first, each into the first pod with room. Return those without room."""
    for name, scaling in sorted(scalings.items(), key=lambda item: (-item[1].num_gpus, -item[1].num_cpus)):
        for _ in range(wanted[name]):
            if not any(room.takes(scaling) for room in rooms):
                yield name
                break


def _group_problems(group: Document, pod: Pod, config: AppConfig) -> Iterator[str]:
    if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
        yield "replicas is outside minReplicas and maxReplicas"
    if float(group["rayStartParams"].get("num-cpus", -1)) != pod.requests("cpu"):
        yield "Ray counts other CPUs than the pod requests"
    resources = pod.container["resources"]
    if resources["requests"]["memory"] != resources["limits"].get("memory"):
        yield "memory is limited to something else than is requested"
    gpus = pod.requests("nvidia.com/gpu")
    if gpus != float(resources["limits"].get("nvidia.com/gpu", 0)):
        yield "GPUs are limited to something else than is requested"
    for own in config.by_model.values():
        if gpus != 0 and gpus != own.worker_scaling.num_gpus:
            yield f"a pod has {gpus:.0f} GPUs, a Worker takes {own.worker_scaling.num_gpus:.0f}"


def _worker_problems(manifests: Manifests, config: AppConfig) -> Iterator[str]:
    given = manifests.args.get("models") or [manifests.args]
    for own, settings in zip(config.by_model.values(), given, strict=True):
        yield from _thread_problems(manifests, own, settings.get("worker", {}).get("num_threads"))


def _thread_problems(manifests: Manifests, config: AppConfig, threads: int | None) -> Iterator[str]:
    pairs = list(zip(manifests.cluster["workerGroupSpecs"], manifests.workers, strict=True))
    hosts = [pod for group, pod in pairs if may_hold(group, pod, config.worker_scaling)]
    if not hosts:
        yield "a Worker fits no pod"
    if threads is None:
        yield "worker.num_threads is left to the machine's cores"
    for pod in hosts:
        if threads is not None and threads > pod.requests("cpu"):
            yield f"a Worker computes on {threads} threads, {pod.name} has {pod.requests('cpu'):.0f} CPUs"


def _budget_problems(manifests: Manifests) -> Iterator[str]:
    groups = {group["groupName"]: group for group in manifests.cluster["workerGroupSpecs"]}
    guarded = set()
    for budget in manifests.of_kind("PodDisruptionBudget"):
        name, least = budget["metadata"]["name"], budget["spec"].get("minAvailable")
        if not isinstance(least, int):
            yield f"budget {name}: only a number as minAvailable holds for pods of a RayCluster"
            continue
        if budget["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"budget {name}: a pod that is not ready blocks the drain of its node"
        group = groups.get(budget["spec"]["selector"]["matchLabels"].get("ray.io/group"))
        if group is None:
            yield f"budget {name} is over no one group"
            continue
        guarded.add(group["groupName"])
        if least >= group["minReplicas"]:
            yield f"budget {name}: no pod of {group['groupName']} can ever be drained"
    yield from (f"group {name} has no disruption budget" for name in sorted(groups.keys() - guarded))
