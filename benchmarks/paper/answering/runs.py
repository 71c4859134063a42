"""Named runs over the pool: each method's plans, answers and scores, as raw rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from rich.console import Console

from benchmarks.paper.answering.answers import Asker, Question
from benchmarks.paper.answering.stores import open_store, publish, retriever_over
from benchmarks.paper.answering.study import Study
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.scoring import majority_scores, score
from lora_store import Plan
from retriever_svc import Encoder, Retriever


class Method(Protocol):
    """Answers questions: returns one plan per question, in order."""

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]: ...


@dataclass(frozen=True, slots=True)
class Bench:
    """Asks the pool's test questions. `retriever`: the server's, over the pool as published."""

    study: Study
    asker: Asker
    retriever: Retriever
    out: Console

    def run(self, name: str, method: Method, per_task: int, part: str = "test") -> pa.Table:
        """Return one row per question of `part`: run, task, number, strategy, adapters and weights, score."""
        questions = self.study.questions(part, per_task)
        plans = method.plans(self.retriever, questions)
        texts = self.asker.answers(list(zip(questions, plans, strict=True)), self.out, name)
        return scored_rows(name, questions, plans, texts, self.study)

    def majority(self, per_task: int) -> pa.Table:
        """Return the same rows for the better guess, which needs no model."""
        questions = self.study.questions("test", per_task)
        parts, specs = self.study.parts, self.study.specs
        by_task = {name: majority_scores(specs[name], parts[name].train, parts[name].test[:per_task]) for name in specs}
        no_plans = [Plan("base")] * len(questions)
        return rows_of("majority", questions, no_plans, [by_task[q.task][q.number] for q in questions])


def scored_rows(
    name: str, questions: Sequence[Question], plans: Sequence[Plan], texts: Sequence[str], study: Study
) -> pa.Table:
    """Return the scored rows of these answers."""
    pairs = zip(questions, texts, strict=True)
    scores = [score(study.specs[question.task], question.item, text) for question, text in pairs]
    return rows_of(name, questions, plans, scores)


def rows_of(name: str, questions: Sequence[Question], plans: Sequence[Plan], scores: Sequence[float]) -> pa.Table:
    """Return rows without texts, which this project may not redistribute."""
    rows = [
        {
            "run": name,
            "task": question.task,
            "number": question.number,
            "strategy": plan.strategy,
            "adapters": [adapter.ref.name for adapter in plan.adapters],
            "weights": [round(adapter.weight, 4) for adapter in plan.adapters],
            "score": round(value, 4),
        }
        for question, plan, value in zip(questions, plans, scores, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


_SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "task": pa.string(),
        "number": pa.int16(),
        "strategy": pa.string(),
        "adapters": pa.list_(pa.string()),
        "weights": pa.list_(pa.float32()),
        "score": pa.float32(),
    }
)


def run_all(bench: Bench, methods: Mapping[str, Method], per_task: int, folder: Path) -> pa.Table:
    """Return the rows of every method. Save each method's rows in `folder` once it ends, so they can be read early."""
    tables = []
    for name, method in methods.items():
        tables.append(bench.run(name, method, per_task))
        write_parquet(folder / f"{name}.parquet", tables[-1])
    return pa.concat_tables(tables)


def pool_retriever(study: Study, asker: Asker, encoder: Encoder, name: str = "pool") -> Retriever:
    """Return the server's Retriever over the store `name` with exactly the study's adapters, for this encoder."""
    uri = study.workspace.store_uri(f"{name}-{encoder.identity}")
    store = open_store(uri)
    live = {task for _, task in store.snapshot().records}
    lacking = [study.workspace.adapters / task for task in study.specs if task not in live]
    if lacking:
        publish(store, lacking, encoder, asker.engine.bank)
    if gone := sorted(live - study.specs.keys()):
        store.withdraw("local", gone, actor="study")
    return retriever_over(store, encoder)
