"""Compose adapters of other kinds with LoRA adapters: `python -m benchmarks.paper.stages.mixed_kinds`.

Twelve tasks get a DoRA and an IA³ adapter too. Each kind answers alone and in a mixture with the LoRA adapters of the
two nearest other tasks. All answers are of one torch model: the server composes LoRA adapters only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench, pool_retriever, scored_rows
from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, NumTasks, PerTask, Root
from benchmarks.paper.common.resumable import Step, key_of, run_steps, write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.train_pool import recipe_of, train_on
from benchmarks.paper.stages.answer_tables import Answers, differences
from benchmarks.paper.stages.gate import greedy_texts, prompt_inputs
from benchmarks.paper.stages.main_table import load_bench
from benchmarks.paper.stages.mixed_pool import chosen_tasks
from benchmarks.paper.training.mixed_kinds import MixedModel
from benchmarks.training.adapter_files import load_base
from benchmarks.training.bigbench_tasks import TaskSpec
from benchmarks.training.lora_training import Kind, Recipe
from gpu_worker.model.base_model import model_source
from lora_store import BASE_PLAN, LOCAL_TENANT, AdapterRef, Plan, PlannedAdapter
from retriever_svc import Encoder
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "mixed_kinds.parquet"
KINDS: tuple[Kind, ...] = ("lora", "dora", "ia3")
RATIOS = {"equal": 1, "3to1": 3}  # the own adapter's weight to that of each companion
TOGETHER = "kinds_equal"
_NAMES = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA³"}
_IA3_RATE = 5e-2  # its factors start at 1; at the matrices' rate they stay there. By the training loss of two tasks
_BATCH = 24
_ANSWER_S = 0.3  # two idle cores; the first estimate


def kind_recipe(spec: TaskSpec, kind: Kind) -> Recipe:
    """Return the task's own recipe for this kind. IA³ has a learning rate of its own."""
    recipe = replace(recipe_of(spec), kind=kind)
    return replace(recipe, learning_rate=_IA3_RATE) if kind == "ia3" else recipe


def name_of(task: str, kind: Kind) -> str:
    return task if kind == "lora" else f"{task}.{kind}"


def folders_of(tasks: Sequence[str], workspace: Workspace, others: Workspace) -> dict[str, Path]:
    """Return the PEFT folder of each adapter by name. `others`: has the kinds that are not LoRA."""
    return {
        name_of(task, kind): (workspace if kind == "lora" else others).adapters / name_of(task, kind)
        for kind in KINDS
        for task in tasks
    }


def runs_of(task: str, companions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the weights of the adapters in each run, for a question with these companions."""
    found: dict[str, dict[str, float]] = {"base": {}}
    for kind in KINDS:
        own = name_of(task, kind)
        found[f"{kind}_alone"] = {own: 1.0}
        for name, ratio in RATIOS.items():
            share = 1 / (ratio + len(companions))
            found[f"{kind}_{name}"] = {own: ratio * share} | dict.fromkeys(companions, share)
    return found | {TOGETHER: {name_of(task, kind): 1 / len(KINDS) for kind in KINDS}}


RUNS = tuple(runs_of("", ()))


class Mixtures:
    """Answers of one torch model with the adapters of all kinds."""

    def __init__(self, base: Any, folders: Mapping[str, Path], tokenizer: Any) -> None:
        self._folders, self._tokenizer = folders, tokenizer
        self._mixed = MixedModel(base, folders)

    @property
    def key(self) -> str:
        """Return a name for answers of these adapters."""
        files = [(name, folder / "adapter_model.safetensors") for name, folder in self._folders.items()]
        return key_of([(name, sha256(path.read_bytes()).hexdigest()) for name, path in files])

    def answers(self, questions: Sequence[Question], weights: Sequence[Mapping[str, float]]) -> list[str]:
        """Return greedy texts, in order."""
        order = sorted(range(len(questions)), key=lambda row: questions[row].max_tokens)
        texts: dict[int, str] = {}
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            asked = [questions[row] for row in rows]
            self._mixed.use([weights[row] for row in rows])
            found = greedy_texts(self._mixed.model, self._tokenizer, asked, prompt_inputs(self._tokenizer, asked))
            texts |= zip(rows, found, strict=True)
        return [texts[row] for row in range(len(questions))]


def kind_rows(bench: Bench, mixtures: Mixtures, run: str, per_task: int) -> pa.Table:
    """Return the rows of one run. Companions are the nearest adapters of other tasks to the question."""
    questions = bench.study.questions("test", per_task)
    nearest = Routed("mixture", 2, masks_own=True).plans(bench.retriever, questions)
    names = [[adapter.ref.name for adapter in plan.adapters] for plan in nearest]
    weights = [runs_of(q.task, companions)[run] for q, companions in zip(questions, names, strict=True)]
    texts = mixtures.answers(questions, weights)
    return scored_rows(run, questions, list(map(_plan, weights)), texts, bench.study)


def _plan(weights: Mapping[str, float]) -> Plan:
    """Return the weights as a plan, for the rows. No engine runs it."""
    adapters = [PlannedAdapter(AdapterRef(LOCAL_TENANT, name, ""), name, w) for name, w in weights.items()]
    return Plan("mixture", tuple(adapters)) if adapters else BASE_PLAN


def more_lost(answers: Answers, kind: Kind, ratio: str) -> Interval:
    """Return what a mixture changes for an own adapter of this kind, less what it changes for an own LoRA adapter."""
    changes = [answers.scores(f"{own}_{ratio}") - answers.scores(f"{own}_alone") for own in (kind, KINDS[0])]
    return bootstrap((changes[0] - changes[1]).to_numpy()[np.newaxis], resamples_tasks=True)


def sentence(folder: Path) -> str:
    """Return how the kinds answer alone, and what equal LoRA companions change."""
    if not (folder / ROWS).exists():
        return "Mixtures with another kind were not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    alone = ", ".join(f"{percent(answers.interval(f'{kind}_alone').mean)} % ({_NAMES[kind]})" for kind in KINDS)
    changes = ", ".join(
        f"{answers.difference(f'{kind}_equal', f'{kind}_alone').in_percent()} ({_NAMES[kind]})" for kind in KINDS
    )
    return (
        f"In one torch model, on {answers.scores('base').shape[0]} tasks, own adapters answer {alone} rightly."
        f" Two equal LoRA companions change that by {changes} points."
    )


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    answers = Answers(rows, {})
    tasks, questions = answers.scores("base").shape
    lines = [
        [kind, *[answers.interval(f"{kind}_{way}").in_percent() for way in ("alone", *RATIOS)]]
        + [answers.difference(f"{kind}_{way}", f"{kind}_alone").in_percent() for way in RATIOS]
        for kind in KINDS
    ]
    own = [
        [task, *[percent(answers.scores(run).loc[task].mean()) for run in RUNS]]
        for task in answers.scores("base").index
    ]
    more = [[kind, *[more_lost(answers, kind, way).in_percent() for way in RATIOS]] for kind in KINDS[1:]]
    pairs = [(f"{kind}_alone", "lora_alone") for kind in KINDS[1:]]
    pairs += [(TOGETHER, f"{kind}_alone") for kind in KINDS]
    return "\n".join(
        [
            "## Mixtures of LoRA with DoRA and IA³\n",
            f"{tasks} tasks, {questions} questions each; percent and points with 95 % intervals. The own adapter is of",
            "the row's kind, its two companions are the LoRA adapters of the nearest other tasks. `3to1`: the own",
            "adapter has three times the weight of each companion. Every layer's output is W x + Σ w δ(x), each δ",
            "that of its kind, in one torch model; the server composes LoRA adapters only.\n",
            table(["own adapter", "alone", *RATIOS, *[f"{way} − alone" for way in RATIOS]], lines),
            "The same change, less that of an own LoRA adapter:\n",
            table(["own adapter", *RATIOS], more),
            f"`{TOGETHER.replace('_', ' ')}`: the task's LoRA, DoRA and IA³ adapters with a third each.\n",
            differences(answers, pairs),
            table(["task", *[run.replace("_", " ") for run in RUNS]], own),
        ]
    )


def measure(bench: Bench, mixtures: Mixtures, encoder: str, folder: Path, per_task: int) -> None:
    """Write rows and the appendix. Known rows are not computed again. `encoder`: its identity."""
    kept = bench.study.workspace.rows / "mixed_kinds" / f"{encoder}-{mixtures.key}"
    steps = [
        Step(
            run,
            kept / f"{run}-{per_task}.parquet",
            float(per_task * len(bench.study.specs)),
            lambda run=run: kind_rows(bench, mixtures, run, per_task),
        )
        for run in RUNS
    ]
    run_steps(steps, _ANSWER_S, bench.out)
    write_parquet(folder / ROWS, pa.concat_tables([pq.read_table(step.path) for step in steps]))
    (folder / "mixed_kinds.md").write_text(section(pd.read_parquet(folder / ROWS)), encoding="utf-8")


def train(bench: Bench, others: Workspace, source: Path) -> None:
    """Train the missing adapters of the kinds that are not LoRA, on the examples of the study's own."""
    specs = {name_of(spec.name, kind): (spec, kind) for spec in bench.study.specs.values() for kind in KINDS[1:]}
    parts = {name: bench.study.parts[spec.name] for name, (spec, _) in specs.items()}
    recipes = {name: kind_recipe(spec, kind) for name, (spec, kind) in specs.items()}
    with Progress() as progress:
        train_on(parts, recipes, others, source, progress)


def main(
    per_task: PerTask = 10,
    num_tasks: NumTasks = 12,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Train the adapters of other kinds, answer in every composition, write rows and the appendix."""
    workspace, others, reader = Workspace(root), Workspace(root / "mixed_kinds"), Encoder(encoder)
    bench = load_bench(workspace, encoder, Console(width=120)).bench
    tasks = chosen_tasks(list(bench.study.specs.values()))[:num_tasks]
    study = replace(bench.study, specs={spec.name: spec for spec in tasks})
    few = replace(bench, study=study, retriever=pool_retriever(study, bench.asker, reader, "kinds"))
    source = Path(model_source(bench.asker.engine.config))
    train(few, others, source)
    mixtures = Mixtures(load_base(source), folders_of(list(study.specs), workspace, others), study.tokenizer)
    measure(few, mixtures, reader.identity, PAPER_RESULTS, per_task)


if __name__ == "__main__":
    typer.run(main)
