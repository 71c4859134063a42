"""Measure when `auto` abstains: `python -m benchmarks.routing.abstention`.

Prompts of the adapters' own tasks should keep their adapters; prompts of other tasks and ordinary prompts should go to
the base model. Two pools: the starter pool, and the pool of the paper's study, with the samples and the test questions
of each. The encoder is the packaged one, untrained. `fresh`: everyday prompts that were written after the
projection and all thresholds were chosen. Nothing is generated. Downloads BIG-bench (358 MB) once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.paper.common.tasks import TaskList, load_parts, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace
from benchmarks.paper.retrieval.loading import pool_specs
from benchmarks.paper.retrieval.projected import read_everyday, read_fresh
from benchmarks.paper.retrieval.ranking import retriever_of
from benchmarks.paper.retrieval.study import Task, study_of
from benchmarks.results_file import write_results
from benchmarks.routing.shipped import STARTER_TASKS, family_of
from benchmarks.starter_pool import HELD_OUT, POOL
from benchmarks.training.bigbench_tasks import read_specs
from deployments.cli.routing import auroc
from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import model_source
from retriever_svc import Encoder, ProjectionFiles, Retriever, Route, RouteRequest
from retriever_svc.calibration import Abstain
from retriever_svc.encoder_files import ENGLISH_MODEL
from retriever_svc.retriever import Encoded

PER_TASK = 25  # prompts of each foreign task
_BATCH = 64
out = Console(width=160)


@dataclass(frozen=True, slots=True)
class Case:
    """A pool, by the samples of each adapter, and the prompts that are routed."""

    name: str
    samples: Mapping[str, Sequence[str]]
    own: Sequence[tuple[str, str]]  # (prompt, its adapter)
    foreign: Sequence[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The choices of one pool at one operating point, as shares of the prompts."""

    pool: str
    abstain: str
    top1: float
    kept: float
    foreign_abstained: float
    ordinary_abstained: float
    fresh_abstained: float
    foreign_auroc: float
    ordinary_auroc: float
    fresh_auroc: float


def starter_case(foreign: Sequence[str]) -> Case:
    """Return the starter pool with its held-out prompts."""
    samples = {path.parent.name: _inputs(path) for path in sorted(POOL.glob("*/lora_samples.jsonl"))}
    own = [(text, path.stem) for path in sorted(HELD_OUT.glob("*.jsonl")) for text in _inputs(path)]
    return Case("starter", samples, own, foreign)


def study_case(tasks: Sequence[Task], foreign: Sequence[str]) -> Case:
    """Return the study's pool with its test questions."""
    own = [(text, task.name) for task in tasks for text in task.test]
    return Case(f"{len(tasks)} tasks", {task.name: task.samples for task in tasks}, own, foreign)


def measure(case: Case, encoder: Encoder) -> Iterator[Outcome]:
    """Yield the outcome at each operating point."""
    retriever = retriever_of(case.samples, encoder.projected(ProjectionFiles().shipped(encoder.identity)))
    prompts = {
        "own": [text for text, _ in case.own],
        "foreign": case.foreign,
        "ordinary": read_everyday(),
        "fresh": read_fresh(),
    }
    encoded = {kind: _encoded(retriever, texts) for kind, texts in prompts.items()}
    for abstain in get_args(Abstain):
        routes = {
            kind: retriever.route_encoded([RouteRequest(text, abstain=abstain) for text in texts], encoded[kind])
            for kind, texts in prompts.items()
        }
        own, foreign, ordinary, fresh = (_routes(routes[kind]) for kind in prompts)
        best = [route.candidates[0].ref.name for route in own]
        yield Outcome(
            case.name,
            abstain,
            float(np.mean([name == right for name, (_, right) in zip(best, case.own, strict=True)])),
            1 - _abstained(own),
            _abstained(foreign),
            _abstained(ordinary),
            _abstained(fresh),
            auroc(_confidences(own), _confidences(foreign)),
            auroc(_confidences(own), _confidences(ordinary)),
            auroc(_confidences(own), _confidences(fresh)),
        )


def _encoded(retriever: Retriever, texts: Sequence[str]) -> list[Encoded]:
    batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    return [item for batch in batches for item in retriever.encode([("local", text) for text in batch])]


def _routes(answers: Sequence[object]) -> list[Route]:
    routes = [answer for answer in answers if isinstance(answer, Route)]
    assert len(routes) == len(answers)
    return routes


def _abstained(routes: Sequence[Route]) -> float:
    return float(np.mean([route.abstained for route in routes]))


def _confidences(routes: Sequence[Route]) -> list[float]:
    return [max(candidate.confidence for candidate in route.candidates) for route in routes]


def _inputs(path: Path) -> list[str]:
    return [json.loads(line)["input"] for line in path.read_text(encoding="utf-8").splitlines()]


def _foreign(listed: TaskList, spares: Sequence[Task], known: Sequence[str]) -> list[str]:
    """Return test prompts of the tasks whose family has no task among the `known` paths."""
    families = {family_of(path) for path in known}
    return [
        text
        for task in spares
        if family_of(listed.by_name[task.name].path) not in families
        for text in task.test[:PER_TASK]
    ]


def main(root: Path = DEFAULT_ROOT) -> None:
    """Measure both pools, print the table and write results/routing."""
    listed, encoder = read_task_list(), Encoder(ENGLISH_MODEL)
    pool = pool_specs(listed)
    tokenizer = AutoTokenizer.from_pretrained(model_source(WorkerConfig()))
    study = study_of(listed, pool, load_parts((*listed.tasks, *listed.spares), Workspace(root), tokenizer))
    starter = _foreign(listed, (*study.tasks, *study.spares), [spec.path for spec in read_specs(STARTER_TASKS)])
    cases = (
        starter_case(starter),
        study_case(study.tasks, _foreign(listed, study.spares, [spec.path for spec in pool])),
    )
    outcomes = [outcome for case in cases for outcome in measure(case, encoder)]
    table = Table(*Outcome.__dataclass_fields__, title="shares of prompts; AUROC of the confidence")
    for outcome in outcomes:
        values = [getattr(outcome, name) for name in Outcome.__dataclass_fields__]
        table.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in values))
    with out.capture() as capture:
        out.print(table)
    rows = [{name: getattr(outcome, name) for name in Outcome.__dataclass_fields__} for outcome in outcomes]
    default = {row["pool"]: row for row in rows if row["abstain"] == "balanced"}
    figures = {
        f"{pool.replace(' ', '_')}_{name}": row[name]
        for pool, row in default.items()
        for name in ("top1", "kept", "foreign_abstained", "ordinary_abstained", "fresh_abstained")
    }
    write_results("routing", figures=figures, table=capture.get(), runs=rows)
    out.print(table)


if __name__ == "__main__":
    typer.run(main)
