"""What is studied: the tasks' texts, and on which tasks each encoder is trained."""

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
MAIN_SHARE = 0.4  # the paper's


@dataclass(frozen=True, slots=True)
class Task:
    """A task's texts, no text in two of its parts: what its adapter is found by, others like them, and the queries."""

    name: str
    cluster: str
    samples: tuple[str, ...]
    more_samples: tuple[str, ...]  # of another adapter of the same task
    choice: tuple[str, ...]  # queries to decide by
    test: tuple[str, ...]  # queries that only figures are made of


@dataclass(frozen=True, slots=True)
class Draw:
    """The tasks one encoder is trained on: a share of all, or of whole clusters."""

    name: str
    tasks: tuple[str, ...]
    share: float
    seed: int
    whole_clusters: bool = False

    @property
    def is_main(self) -> bool:
        """Whether the headlines are made of it."""
        return self.share == MAIN_SHARE and not self.whole_clusters


@dataclass(frozen=True, slots=True)
class Study:
    """`tasks` are the pool; `spares` let it grow. An encoder is trained on each of `shares` for each of `seeds`."""

    tasks: tuple[Task, ...]
    spares: tuple[Task, ...]
    shares: tuple[float, ...] = SHARES
    seeds: tuple[int, ...] = SEEDS

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def digest(self) -> str:
        """Of the pool and its texts: what was measured on another pool is not taken for this one's."""
        return hashlib.sha256(repr(sorted(self.tasks, key=lambda task: task.name)).encode()).hexdigest()[:8]

    def draws(self) -> list[Draw]:
        """Those that the headlines need come first."""
        shared = [_share(self.names, share, seed) for seed in self.seeds for share in self.shares]
        clusters = [_clusters(self.tasks, MAIN_SHARE, seed) for seed in self.seeds]
        return sorted([*shared, *clusters], key=lambda draw: (not draw.is_main, draw.seed))


def study_of(listed: TaskList, pool: Sequence[TaskSpec], parts: Mapping[str, Parts]) -> Study:
    """The pool's tasks, and as spares all others with queries and as many samples."""
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
    """Clusters in a random order, each taken unless that would exceed `share` of the tasks."""
    clusters = sorted({task.cluster for task in tasks})
    random.Random(seed).shuffle(clusters)
    chosen: list[str] = []
    for cluster in clusters:
        own = [task.name for task in tasks if task.cluster == cluster]
        if len(chosen) + len(own) <= round(share * len(tasks)):
            chosen += own
    return Draw(f"clusters{100 * share:.0f}-seed{seed}", tuple(sorted(chosen)), share, seed, whole_clusters=True)
