"""The tasks' texts, and the training tasks of each encoder."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.paper.common.tasks import Parts, TaskList
from benchmarks.training.bigbench_tasks import TaskSpec
from retriever_svc import choose_tasks

UNTRAINED = "untrained"
SHARES = (0.1, 0.2, 0.4, 0.6, 1.0)
SEEDS = (0, 1, 2)
MAIN_SHARE = 0.4  # as in the paper
MAIN_SEEDS = (0, 1, 2, 3, 4)  # of the comparison with the projection, which needs no training


@dataclass(frozen=True, slots=True)
class Task:
    """A task's texts, without common texts: samples of its adapter, further texts like them, and the queries."""

    name: str
    cluster: str
    samples: tuple[str, ...]
    more_samples: tuple[str, ...]  # samples of another adapter of the same task
    choice: tuple[str, ...]  # queries for decisions
    test: tuple[str, ...]  # queries for results only


@dataclass(frozen=True, slots=True)
class Draw:
    """The training tasks of one encoder: a share of all tasks, or of whole clusters."""

    name: str
    tasks: tuple[str, ...]
    share: float
    seed: int
    whole_clusters: bool = False

    @property
    def is_main(self) -> bool:
        """Whether the headline numbers depend on it."""
        return self.share == MAIN_SHARE and not self.whole_clusters


@dataclass(frozen=True, slots=True)
class Study:
    """The tasks of the pool, and `spares` that let it grow. An encoder is trained per share and seed."""

    tasks: tuple[Task, ...]
    spares: tuple[Task, ...]
    shares: tuple[float, ...] = SHARES
    seeds: tuple[int, ...] = SEEDS

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def digest(self) -> str:
        """Return a digest of the pool and its texts, so that results of another pool are not reused."""
        return hashlib.sha256(repr(sorted(self.tasks, key=lambda task: task.name)).encode()).hexdigest()[:8]

    def draws(self) -> list[Draw]:
        """Return all draws, those of the headline numbers first."""
        shared = [_share(self.names, share, seed) for seed in self.seeds for share in self.shares]
        clusters = [_clusters(self.tasks, MAIN_SHARE, seed) for seed in self.seeds]
        return sorted([*shared, *clusters], key=lambda draw: (not draw.is_main, draw.seed))


def main_draws(names: Sequence[str]) -> list[Draw]:
    """Return the draws of the paper's share of tasks."""
    return [_share(names, MAIN_SHARE, seed) for seed in MAIN_SEEDS]


def study_of(listed: TaskList, pool: Sequence[TaskSpec], parts: Mapping[str, Parts]) -> Study:
    """Return the study of the pool's tasks. Spares: all other tasks with queries and as many samples."""
    tasks, others = (
        tuple(_task(spec.name, spec.cluster, parts[spec.name]) for spec in specs)
        for specs in (pool, [spec for spec in listed.by_name.values() if spec not in pool])
    )
    return Study(tasks, tuple(task for task in others if len(task.samples) == len(tasks[0].samples) and task.test))


def _task(name: str, cluster: str, parts: Parts) -> Task:
    samples, train, choice, test = (
        tuple(item.input for item in items) for items in (parts.samples, parts.train, parts.choice, parts.test)
    )
    return Task(name, cluster, samples, train[: len(samples)], choice, test)


def _share(names: Sequence[str], share: float, seed: int) -> Draw:
    return Draw(f"share{100 * share:.0f}-seed{seed}", tuple(choose_tasks(names, share, seed)), share, seed)


def _clusters(tasks: Sequence[Task], share: float, seed: int) -> Draw:
    """Return clusters in a random order. Skip each that would exceed `share` of the tasks."""
    clusters = sorted({task.cluster for task in tasks})
    random.Random(seed).shuffle(clusters)
    chosen: list[str] = []
    for cluster in clusters:
        own = [task.name for task in tasks if task.cluster == cluster]
        if len(chosen) + len(own) <= round(share * len(tasks)):
            chosen += own
    return Draw(f"clusters{100 * share:.0f}-seed{seed}", tuple(sorted(chosen)), share, seed, whole_clusters=True)
