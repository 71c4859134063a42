"""The tasks whose adapters form the trained baselines, drawn by fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.training.bigbench_tasks import TaskSpec, task_rng

HUB_ADAPTERS = 20


def one_a_cluster(specs: Sequence[TaskSpec]) -> list[str]:
    """Draw a task of each cluster. Their adapters are the experts of MoE and SMEAR."""
    draw, clusters = task_rng("experts"), dict.fromkeys(spec.cluster for spec in specs)
    return [draw.choice([spec.name for spec in specs if spec.cluster == cluster]) for cluster in clusters]


def hub_tasks(specs: Sequence[TaskSpec]) -> list[str]:
    """Draw the tasks of LoRAHub."""
    return task_rng("lorahub").sample(sorted(spec.name for spec in specs), min(HUB_ADAPTERS, len(specs)))
