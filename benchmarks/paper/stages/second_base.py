"""Serve adapters of two base models from one index: `python -m benchmarks.paper.stages.second_base`.

The second base is derived from the first (see `training.second_base`) and gets adapters for twelve tasks of the pool.
Each base has an engine of its own. One Retriever holds the adapters of both; a tag names the base of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.answers import Asker, Question, loading
from benchmarks.paper.answering.methods import Base
from benchmarks.paper.answering.runs import scored_rows
from benchmarks.paper.answering.stores import ACTOR, fetch_from, retriever_over
from benchmarks.paper.answering.study import Study, load_study, worker_config
from benchmarks.paper.common.resumable import key_of
from benchmarks.paper.common.tasks import NUM_SAMPLES, Parts, read_task_list
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.train_pool import choose_recipe, train_all, train_on
from benchmarks.paper.stages.answers import Claim
from benchmarks.paper.stages.stage import Context, Stage, run
from benchmarks.paper.training.second_base import BaseRecipe, make_second_base
from benchmarks.training.adapter_files import BASE_NAME
from benchmarks.training.bigbench_tasks import TaskSpec
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.model.base_model import model_source
from gpu_worker.native.loop import Engine
from lora_store import LOCAL_TENANT, AdapterRef, LoraStore, Plan
from retriever_svc import Encoder, Retriever, Route, RouteRequest, embed_groups

SECOND_NAME = f"{BASE_NAME}-pruned"
FIRST, SECOND = "first", "second"
TOP_K = 3
NUM_CLUSTERS, TASKS_PER_CLUSTER = 3, 4
_NO_FLOOR = -1.0
_FOLDER = "second_base"


@dataclass(frozen=True, slots=True)
class OneBase:
    """A base model with its engine and its adapters. `name`: the tag of these; `folders`: the PEFT folder by task."""

    name: str
    asker: Asker
    folders: Mapping[str, Path]

    def name_adapter(self, task: str) -> str:
        """Return the name of the task's adapter of this base."""
        return f"{task}.{self.name}"


def find_task(ref: AdapterRef) -> str:
    """Return the task of an adapter."""
    return ref.name.rpartition(".")[0]


def publish_both(store: LoraStore, bases: Sequence[OneBase], encoder: Encoder) -> None:
    """Publish the adapters of both bases, each with its base as a tag, unless they are live."""
    live = {name for _, name in store.snapshot().records}
    staged = [
        store.stage(folder, name=base.name_adapter(task), tags=[base.name], module_shapes=base.asker.engine.bank.shapes)
        for base in bases
        for task, folder in base.folders.items()
        if base.name_adapter(task) not in live
    ]
    if staged:
        embeddings = embed_groups(encoder, [item.samples for item in staged])
        store.commit(staged, embeddings, [None] * len(staged), actor=ACTOR)


class TwoBases:
    """Two bases behind one Retriever, asked the test questions of the tasks that both have an adapter for."""

    def __init__(self, study: Study, bases: Sequence[OneBase], retriever: Retriever, out: Console) -> None:
        self.study, self.bases, self.out, self._retriever = study, bases, out, retriever

    def routes(self, questions: Sequence[Question], base: str | None, top_k: int) -> list[Route]:
        """Return the route of each question, with equal weights. A request with a base finds its adapters only."""
        tags = () if base is None else (base,)
        requests = [
            RouteRequest(
                q.item.input, strategy="mixture", weighting="uniform", top_k=top_k, min_score=_NO_FLOOR, tags=tags
            )
            for q in questions
        ]
        found = self._retriever.route(requests)
        assert all(isinstance(route, Route) for route in found), found
        return [route for route in found if isinstance(route, Route)]

    def name_plans(self, base: OneBase, tasks: Sequence[str]) -> list[Plan]:
        """Return the plan of one adapter of this base for each of the tasks."""
        choices = [[(base.name_adapter(task), 1.0)] for task in tasks]
        return [self._retriever.plan_named(LOCAL_TENANT, chosen, "selection") for chosen in choices]

    def answer(self, per_task: int) -> pa.Table:
        """Answer by each base: without adapter, with the own one, and with those found for it or for the task."""
        questions, tables = self.study.questions("test", per_task), []
        found = [find_task(route.candidates[0].ref) for route in self.routes(questions, None, 1)]
        for base in self.bases:
            selected = [replace(route.plan, strategy="selection") for route in self.routes(questions, base.name, 1)]
            ways = {
                "base": Base().plans(self._retriever, questions),
                "perfect": self.name_plans(base, [question.task for question in questions]),
                "selection": selected,
                "mixture": [route.plan for route in self.routes(questions, base.name, TOP_K)],
                "found": self.name_plans(base, found),
            }
            for way, plans in ways.items():
                run = f"{way}_{base.name}"
                texts = base.asker.answers(list(zip(questions, plans, strict=True)), self.out, run)
                tables.append(scored_rows(run, questions, plans, texts, self.study))
        return pa.concat_tables(tables)


def open_asker(store: LoraStore, config: NativeWorkerConfig, kept: Path) -> Asker:
    """Return an engine of this base whose adapters are in `store`."""
    executor = load_executor(config.load_threads)
    engine = Engine(config, loading(lambda digest: fetch_from(store, digest), executor), executor=executor)
    return Asker(engine, kept)


def train_second(specs: Sequence[TaskSpec], parts: Mapping[str, Parts], workspace: Workspace, source: Path) -> None:
    """Train the second base's adapters in the upper half of its layers. Their samples are other inputs of the task."""
    first_layer = BaseRecipe().num_layers // 2
    recipes = {spec.name: replace(choose_recipe(spec), first_layer=first_layer) for spec in specs}
    own = {spec.name: replace(parts[spec.name], samples=parts[spec.name].train[:NUM_SAMPLES]) for spec in specs}
    with Progress() as progress:
        train_on(own, recipes, workspace, source, progress, SECOND_NAME)


def make_base(context: Context, recipe: BaseRecipe) -> tuple[Workspace, Path]:
    """Derive the second base once. Return the workspace of its adapters, and its folder there."""
    workspace, source = context.workspace, Path(model_source(NativeWorkerConfig()))
    study = load_study([read_task_list().by_name[name] for name in context.tasks], workspace, NativeWorkerConfig())
    texts = [item.input for parts in study.parts.values() for item in parts.train]
    held_out = [item.input for parts in study.parts.values() for item in parts.choice]
    own = Workspace(workspace.root / _FOLDER / key_of(recipe, list(study.specs)))
    steps = recipe.training.num_steps

    def show(step: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            context.out.print(f"second base: {step} of {steps} steps, divergence {loss:.2f}", markup=False)

    make_second_base(source, own.root / "base", texts, held_out, recipe, show)
    return own, own.root / "base"


def choose_tasks(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Return the first tasks of the largest clusters, because related tasks are composed."""
    largest = [cluster for cluster, _ in Counter(spec.cluster for spec in specs).most_common(NUM_CLUSTERS)]
    return [spec for name in largest for spec in [s for s in specs if s.cluster == name][:TASKS_PER_CLUSTER]]


def load_two(
    study: Study, own: Workspace, configs: Mapping[str, NativeWorkerConfig], encoder: Encoder, out: Console
) -> TwoBases:
    """Load both bases with their adapters, which must have been trained, and publish these into one store.

    `own`: the workspace of the second base's adapters. `configs`: the worker of each base.
    """
    store = LoraStore(own.store_uri(f"both-{encoder.identity}"), accepts_base=[BASE_NAME, SECOND_NAME])
    bases = [
        OneBase(
            name,
            open_asker(store, configs[name], own.root / f"answers_{name}.jsonl"),
            {task: workspace.adapters / task for task in study.specs},
        )
        for name, workspace in {FIRST: study.workspace, SECOND: own}.items()
    ]
    publish_both(store, bases, encoder)
    return TwoBases(study, bases, retriever_over(store, encoder), out)


def answer_both(context: Context) -> pa.Table:
    """Derive the second base, train its adapters, and answer over both bases."""
    own, base = make_base(context, BaseRecipe())
    listed = read_task_list().by_name
    specs = choose_tasks([listed[name] for name in context.tasks])
    with Progress() as progress:
        train_all(specs, context.workspace, Path(model_source(NativeWorkerConfig())), progress)
    configs = {FIRST: worker_config(len(specs)), SECOND: worker_config(len(specs), base_model=str(base))}
    study = load_study(specs, context.workspace, configs[FIRST])
    train_second(specs, study.parts, own, base)
    return load_two(study, own, configs, context.encoder, context.out).answer(context.per_task)


STAGE = Stage(
    name="second_base",
    title="A second base model",
    note="Adapters of two bases in one index. `found`: the adapter of the task that is nearest over both bases.",
    rows=answer_both,
    claims=(
        *[
            Claim("Own adapters are better than their base.", f"perfect_{base}", f"base_{base}")
            for base in (FIRST, SECOND)
        ],
        *[
            Claim("Selection is as good as own adapters.", f"selection_{base}", f"perfect_{base}", "equal")
            for base in (FIRST, SECOND)
        ],
        *[
            Claim("The mixture is as good as selection.", f"mixture_{base}", f"selection_{base}", "equal")
            for base in (FIRST, SECOND)
        ],
    ),
    per_task=15,
)

if __name__ == "__main__":
    run(STAGE)
