"""Serve adapters of two base models from one index: `python -m benchmarks.paper.stages.second_base`.

The second base is derived from the first (see `training.second_base`) and gets adapters for twelve tasks of the pool.
Each base has an engine of its own. One Retriever holds the adapters of both; a tag names the base of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.answers import Asker, Question, loading
from benchmarks.paper.answering.likelihood import Candidate, candidates_of, most_likely
from benchmarks.paper.answering.methods import Base
from benchmarks.paper.answering.runs import scored_rows
from benchmarks.paper.answering.stores import ACTOR, fetch_from, retriever_over
from benchmarks.paper.answering.study import Study, load_study, worker_config
from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, NumTasks, PerTask, Root
from benchmarks.paper.common.resumable import Step, key_of, run_steps, write_parquet
from benchmarks.paper.common.tasks import NUM_SAMPLES, Parts, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.pool.train_pool import recipe_of, train_all, train_on
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.ensemble import Ensemble, Member
from benchmarks.paper.stages.mixed_pool import chosen_tasks
from benchmarks.paper.training.second_base import RECORD, BaseRecipe, make_second_base
from benchmarks.training.adapter_files import BASE_NAME, load_base
from benchmarks.training.bigbench_tasks import TaskSpec
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import model_source
from gpu_worker.native.loop import Engine
from lora_store import LOCAL_TENANT, AdapterRef, LoraStore, Plan
from retriever_svc import Encoder, Retriever, Route, RouteRequest, embed_groups
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS, FOUND = "second_base.parquet", "second_base_found.parquet"
SECOND_NAME = f"{BASE_NAME}-pruned"
FIRST, SECOND = "first", "second"
TOP_K = 3
_NO_FLOOR = -1.0
_TEMPERATURE = 0.05  # the server's default
_AVERAGED_S = 0.5  # two idle cores; the first estimate
_FOLDER = "second_base"


@dataclass(frozen=True, slots=True)
class OneBase:
    """A base model with its engine and its adapters. `folders`: the PEFT folder of each task's adapter."""

    name: str  # FIRST or SECOND: the tag of its adapters
    asker: Asker
    folders: Mapping[str, Path]

    def adapter(self, task: str) -> str:
        """Return the name of the task's adapter of this base."""
        return adapter_name(task, self.name)


def adapter_name(task: str, base: str) -> str:
    return f"{task}.{base}"


def task_of(ref: AdapterRef) -> str:
    return ref.name.rpartition(".")[0]


def publish_both(store: LoraStore, bases: Sequence[OneBase], encoder: Encoder) -> None:
    """Publish the adapters of both bases, each with its base as a tag, unless they are live."""
    live = {name for _, name in store.snapshot().records}
    staged = [
        store.stage(folder, name=base.adapter(task), tags=[base.name], module_shapes=base.asker.engine.bank.shapes)
        for base in bases
        for task, folder in base.folders.items()
        if base.adapter(task) not in live
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

    def named(self, base: OneBase, tasks: Sequence[str]) -> list[Plan]:
        """Return the plan of one adapter of this base for each of the tasks."""
        choices = [[(base.adapter(task), 1.0)] for task in tasks]
        return [self._retriever.plan_named(LOCAL_TENANT, chosen, "selection") for chosen in choices]

    def base_rows(self, per_task: int) -> pa.Table:
        """Answer by each base: without adapter, with the own one, and with those found for it or for the task."""
        questions, tables = self.study.questions("test", per_task), []
        found = self.found_tasks(questions)
        for base in self.bases:
            ways = {
                "base": Base().plans(self._retriever, questions),
                "perfect": self.named(base, [q.task for q in questions]),
                "selection": [_selected(route) for route in self.routes(questions, base.name, 1)],
                "mixture": [route.plan for route in self.routes(questions, base.name, TOP_K)],
                "found": self.named(base, found),
            }
            for way, plans in ways.items():
                run = f"{way}_{base.name}"
                texts = base.asker.answers(list(zip(questions, plans, strict=True)), self.out, run)
                tables.append(scored_rows(run, questions, plans, texts, self.study))
        return pa.concat_tables(tables)

    def found_tasks(self, questions: Sequence[Question]) -> list[str]:
        """Return the task of the nearest adapter of either base."""
        return [task_of(route.candidates[0].ref) for route in self.routes(questions, None, 1)]

    def voted_rows(self, per_task: int) -> pa.Table:
        """Let both bases answer with their adapters of one task; if they differ, the more probable answer counts."""
        questions, tables = self.study.questions("test", per_task), []
        for run, tasks in self._both(questions).items():
            found = [
                candidates_of(base.asker, questions, self.named(base, tasks), self.out, f"{run} by {base.name}")
                for base in self.bases
            ]
            chosen = [voted([own[0] for own in pair]) for pair in zip(*found, strict=True)]
            plans, texts = [candidate.plan for candidate in chosen], [candidate.text for candidate in chosen]
            tables.append(scored_rows(f"voted_{run}", questions, plans, texts, self.study))
        return pa.concat_tables(tables)

    def averaged_rows(self, ensemble: Ensemble, per_task: int) -> pa.Table:
        """Let both bases choose every token together, each with its adapter of one task."""
        questions, tables = self.study.questions("test", per_task), []
        both = self._both(questions)
        asked = sorted({pair for tasks in both.values() for pair in enumerate(tasks)})
        names = [[[task] for _ in self.bases] for _, task in asked]
        texts = dict(zip(asked, ensemble.answers([questions[place] for place, _ in asked], names), strict=True))
        for run, tasks in both.items():
            plans, chosen = self.named(self.bases[0], tasks), [texts[pair] for pair in enumerate(tasks)]
            tables.append(scored_rows(f"averaged_{run}", questions, plans, chosen, self.study))
        return pa.concat_tables(tables)

    def hits(self, per_task: int) -> pa.Table:
        """Return what retrieval finds for each question, with and without a base in the request."""
        questions = self.study.questions("test", per_task)
        rows = []
        for base in (None, *[base.name for base in self.bases]):
            for question, route in zip(questions, self.routes(questions, base, TOP_K), strict=True):
                scores = np.array([c.score for c in route.candidates])
                weights = np.exp((scores - scores.max()) / _TEMPERATURE)
                own = np.array([task_of(c.ref) == question.task for c in route.candidates])
                second = np.array([c.ref.name.endswith(f".{SECOND}") for c in route.candidates])
                rows.append(
                    {"base": base or "both", "task": question.task, "number": question.number}
                    | {"is_own": bool(own[0]), "is_second": bool(second[0])}
                    | {"num_tasks": len({task_of(c.ref) for c in route.candidates}), "num_second": int(second.sum())}
                    | {"own_weight": float(weights[own].sum() / weights.sum())}
                    | {"second_weight": float(weights[second].sum() / weights.sum())}
                )
        return pa.Table.from_pylist(rows)

    def _both(self, questions: Sequence[Question]) -> dict[str, list[str]]:
        """Return the task whose adapters both bases use for each question: the own one, or the one that is found."""
        return {"own": [q.task for q in questions], "found": self.found_tasks(questions)}


def _selected(route: Route) -> Plan:
    """Return the plan of the route's only adapter as a selection."""
    return replace(route.plan, strategy="selection")


def voted(candidates: Sequence[Candidate]) -> Candidate:
    """Return the first of equal answers, else the one with the higher mean log probability."""
    if len({candidate.text.strip() for candidate in candidates}) == 1:
        return candidates[0]
    return candidates[most_likely(candidates)]


def nearer(found: pd.DataFrame) -> Interval:
    """Return how much more often the nearest adapter is of the question's task, over both bases than over the first."""
    hits = {
        base: own.pivot(index="task", columns="number", values="is_own").astype(float)
        for base, own in found.groupby("base")
    }
    return bootstrap((hits["both"] - hits[FIRST]).to_numpy()[np.newaxis], resamples_tasks=True)


PAIRS = [
    *[(f"perfect_{base}", f"base_{base}") for base in (FIRST, SECOND)],
    ("perfect_second", "perfect_first"),
    *[(f"selection_{base}", f"perfect_{base}") for base in (FIRST, SECOND)],
    *[(f"mixture_{base}", f"selection_{base}") for base in (FIRST, SECOND)],
    *[(f"{way}_{run}", f"{one}_first") for run, one in (("own", "perfect"), ("found", "found"))
      for way in ("averaged", "voted")],
    ("averaged_found", "voted_found"),
]  # fmt: skip


def sentence(folder: Path) -> str:
    """Return what a second base model showed."""
    if not all((folder / name).exists() for name in (ROWS, FOUND)):
        return "A second base model was not measured yet."
    answers, found = Answers(pd.read_parquet(folder / ROWS), {}), pd.read_parquet(folder / FOUND)
    means = {run: percent(answers.interval(run).mean) for run in answers.runs}
    gains = [answers.difference(f"{way}_found", "found_first").in_percent() for way in ("averaged", "voted")]
    share = found.loc[found["base"] == "both", "second_weight"].mean()
    return (
        f"A second base, pruned and distilled from the first, has {means['perfect_second']} % with own adapters where"
        f" the first has {means['perfect_first']} ({answers.scores('base_first').shape[0]} tasks). Selection from one"
        f" index for both has {means['selection_second']} and {means['selection_first']} %. Without a base in the"
        f" request, the second's adapters get {percent(share)} % of the softmax weight. The own task comes first"
        f" {nearer(found).in_percent()} points more often than among the first's adapters alone. Compared with the"
        f" first base's adapter of the same task, averaging log probabilities changes right answers by {gains[0]}"
        f" points, a vote by {gains[1]}."
    )


def section(rows: pd.DataFrame, found: pd.DataFrame, record: Mapping[str, Any]) -> str:
    """Return the appendix."""
    answers = Answers(rows, {})
    tasks, questions = answers.scores("base_first").shape
    ways = ("base", "perfect", "selection", "mixture")
    lines = [[way, *[answers.interval(f"{way}_{base}").in_percent() for base in (FIRST, SECOND)]] for way in ways]
    of_task = {f"{base} base alone": (f"perfect_{base}", f"found_{base}") for base in (FIRST, SECOND)}
    of_task |= {way: (f"{way}_own", f"{way}_found") for way in ("averaged", "voted")}
    joint = [[way, *[answers.interval(run).in_percent() for run in runs]] for way, runs in of_task.items()]
    own = [
        [task, *[percent(answers.scores(run).loc[task].mean()) for run in answers.runs]]
        for task in answers.scores("base_first").index
    ]
    kept = ", ".join(str(layer) for layer in record["kept"])
    before, after = record["divergence_before"], record["divergence_after"]
    return "\n".join(
        [
            "## A second base model\n",
            f"The second base has {len(record['kept'])} layers of the first ({kept}; the most influential ones, by the",
            "cosine of their input and output), embeddings of its own, and a short distillation on the inputs of the",
            "pool's training examples, without answers. Its divergence from the first on other inputs, over the most",
            f"common ids and those of the prompts, fell from {before:.2f} to {after:.2f} nats a token. It has its own",
            "adapters, trained by the study's recipe.",
            f"{tasks} tasks (four of each of the three largest clusters), {questions} questions each; percent with",
            "95 % intervals. One index has the adapters of both bases, embedded by different samples. A tag names the",
            "base of each, so a request for one base finds its adapters only.\n",
            table(["", "first base", "second base"], lines),
            "Both bases answer with their adapters of one task: the question's own, or that of the nearest adapter of",
            "either base. `averaged`: the mean of both log probabilities chooses every token. `voted`: if the answers",
            "differ, the one with the higher mean log probability counts.\n",
            table(["", "own task", "found task"], joint),
            differences(answers, PAIRS),
            "### What retrieval makes of two bases\n",
            _found_table(found),
            "Top-1 by task without a base in the request, less that of requests for the first base:",
            f"{nearer(found).in_percent()} points.\n",
            table(["task", *[run.replace("_", " ") for run in answers.runs]], own),
        ]
    )


def _found_table(found: pd.DataFrame) -> str:
    """Return a row per kind of request."""
    lines = []
    for base in ("both", FIRST, SECOND):
        own = found[found["base"] == base]
        name = "without a base" if base == "both" else f"for the {base}"
        shares = [own["is_own"].mean(), own["own_weight"].mean(), own["is_second"].mean()]
        lines.append([name, *map(percent, shares), percent(own["num_second"].mean() / TOP_K)])
        lines[-1].append(f"{own['num_tasks'].mean():.2f}")
    header = ["request", "top-1 by task", "softmax weight of the own task", "nearest is of the second base"]
    return table([*header, "of the three nearest", "different tasks among them"], lines)


def write_tables(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the appendix from the rows in `folder`."""
    rows, found = (pd.read_parquet(folder / name) for name in (ROWS, FOUND))
    (folder / "second_base.md").write_text(section(rows, found, record), encoding="utf-8")


def measure(both: TwoBases, ensemble: Ensemble, kept: Path, folder: Path, per_task: int) -> None:
    """Write the rows into `folder`. Known answers, and rows in `kept`, are not computed again."""
    averaged = Step(
        "averaged",
        kept / f"averaged-{per_task}.parquet",
        2.0 * per_task * len(both.study.specs),
        lambda: both.averaged_rows(ensemble, per_task),
    )
    parts = [both.base_rows(per_task), both.voted_rows(per_task)]
    run_steps([averaged], _AVERAGED_S, both.out)
    write_parquet(folder / ROWS, pa.concat_tables([*parts, pq.read_table(averaged.path)]))
    write_parquet(folder / FOUND, both.hits(per_task))


def asker_over(store: LoraStore, config: WorkerConfig, kept: Path) -> Asker:
    """Return an engine of this base whose adapters are in `store`."""
    executor = load_executor(config.load_threads)
    engine = Engine(config, loading(lambda digest: fetch_from(store, digest), executor), executor=executor)
    return Asker(engine, kept, with_logprobs=True)


def train_second(specs: Sequence[TaskSpec], parts: Mapping[str, Parts], workspace: Workspace, source: Path) -> None:
    """Train the second base's adapters in the upper half of its layers. Their samples are other inputs of the task."""
    first_layer = BaseRecipe().num_layers // 2
    recipes = {spec.name: replace(recipe_of(spec), first_layer=first_layer) for spec in specs}
    own = {spec.name: replace(parts[spec.name], samples=parts[spec.name].train[:NUM_SAMPLES]) for spec in specs}
    with Progress() as progress:
        train_on(own, recipes, workspace, source, progress, SECOND_NAME)


def make_base(workspace: Workspace, recipe: BaseRecipe, out: Console) -> tuple[Workspace, Path]:
    """Derive the second base once. Return the workspace of its adapters, and its folder there."""
    source = Path(model_source(WorkerConfig()))
    study = load_study([read_task_list().by_name[name] for name in read_pool()], workspace, WorkerConfig())
    texts = [item.input for parts in study.parts.values() for item in parts.train]
    held_out = [item.input for parts in study.parts.values() for item in parts.choice]
    own = Workspace(workspace.root / _FOLDER / key_of(recipe, list(study.specs)))
    steps = recipe.training.num_steps

    def show(step: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            out.print(f"second base: {step} of {steps} steps, divergence {loss:.2f}", markup=False)

    make_second_base(source, own.root / "base", texts, held_out, recipe, show)
    return own, own.root / "base"


def load_two(
    study: Study, own: Workspace, configs: Mapping[str, WorkerConfig], encoder: Encoder, out: Console
) -> tuple[TwoBases, Ensemble]:
    """Load both bases with their adapters, which must have been trained, and publish these into one store.

    `own`: the workspace of the second base's adapters. `configs`: the worker of each base.
    """
    store = LoraStore(own.store_uri(f"both-{encoder.identity}"), accepts_base=[BASE_NAME, SECOND_NAME])
    bases = []
    for name, workspace in {FIRST: study.workspace, SECOND: own}.items():
        asker = asker_over(store, configs[name], own.root / f"answers_{name}.jsonl")
        bases.append(OneBase(name, asker, {task: workspace.adapters / task for task in study.specs}))
    publish_both(store, bases, encoder)
    live, members = store.snapshot(), []
    for base in bases:
        digests = {task: live.resolve(LOCAL_TENANT, base.adapter(task)).weights_digest for task in study.specs}
        weights = {task: fetch_from(store, digest) for task, digest in digests.items()}
        members.append(Member(load_base(Path(model_source(configs[base.name]))), weights))
    return TwoBases(study, bases, retriever_over(store, encoder), out), Ensemble(members, study.tokenizer)


def main(
    per_task: PerTask = 15,
    num_tasks: NumTasks = 12,
    num_steps: Annotated[int, typer.Option(help="steps of the distillation")] = BaseRecipe().training.num_steps,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Derive the second base, train its adapters, answer over both bases, write rows and the appendix."""
    workspace, out, reader = Workspace(root), Console(width=120), Encoder(encoder)
    recipe = BaseRecipe()
    own, base = make_base(workspace, replace(recipe, training=replace(recipe.training, num_steps=num_steps)), out)
    listed = read_task_list().by_name
    specs = chosen_tasks([listed[name] for name in read_pool()])[:num_tasks]
    source = Path(model_source(WorkerConfig()))
    with Progress() as progress:
        train_all(specs, workspace, source, progress)
    configs = {FIRST: worker_config(num_tasks), SECOND: worker_config(num_tasks, base_model=str(base))}
    study = load_study(specs, workspace, configs[FIRST])
    train_second(specs, study.parts, own, base)
    both, ensemble = load_two(study, own, configs, reader, out)
    kept = workspace.rows / _FOLDER / f"{reader.identity}-{own.root.name}-{num_tasks}"
    measure(both, ensemble, kept, PAPER_RESULTS, per_task)
    write_tables(PAPER_RESULTS, json.loads((base / RECORD).read_text(encoding="utf-8")))


if __name__ == "__main__":
    typer.run(main)
