"""Train the adapters of twelve tasks again in other ways: `python -m benchmarks.paper.stages.recipes`.

Two more seeds show how much of a difference is one training's luck. Training at a third of the scale in turn, and at a
tenth of the learning rate, show whether mixtures fail because adapters are saturated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.runs import Bench
from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.train_pool import recipe_of, train_on
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.main_table import load_bench
from benchmarks.paper.stages.mixed_pool import METHODS, chosen_tasks, mixed_bench, pool_rows
from benchmarks.training.bigbench_tasks import TaskSpec
from benchmarks.training.lora_training import Recipe
from gpu_worker.model.base_model import model_source
from retriever_svc import Encoder
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "recipes.parquet"
SEEDS = ("seed0", "seed1", "seed2")  # seed0: the study's own adapters
SCALES, SLOW = "scales", "slow"
KINDS = (*SEEDS, SCALES, SLOW)
_PAIRS = (("mixture_iid", "selection_iid"), ("mixture_ood", "selection_ood"), ("mixture_iid", "fusion_iid"))


def recipe_for(recipe: Recipe, kind: str) -> Recipe:
    """Return the recipe with the change of this kind."""
    if kind == SCALES:
        return replace(recipe, scales=(1.0, 1 / 3))
    if kind == SLOW:
        return replace(recipe, learning_rate=recipe.learning_rate / 10)
    return replace(recipe, seed=SEEDS.index(kind))


def workspace_of(root: Path, kind: str) -> Workspace:
    """Return the folder of this kind's adapters; the study's own for its seed."""
    return Workspace(root if kind == SEEDS[0] else root / "recipes" / kind)


def all_rows(bench: Bench, encoder: Encoder, root: Path, per_task: int) -> Iterator[pa.Table]:
    """Yield the rows of each kind over a pool of exactly its adapters, which must have been trained."""
    for kind in KINDS:
        is_own = kind == SEEDS[0]
        own = bench if is_own else mixed_bench(bench, bench.study, workspace_of(root, kind))
        yield pool_rows(own, encoder, kind, per_task)


def over_seeds(answers: Answers, one: str, other: str) -> str:
    """Return the difference over all seeds, with seeds, tasks and questions resampled."""
    found = [(answers.scores(f"{seed}_{one}") - answers.scores(f"{seed}_{other}")).to_numpy() for seed in SEEDS]
    return bootstrap(np.stack(found), resamples_tasks=True).in_percent()


def section(rows: pd.DataFrame) -> str:
    """Return the appendix."""
    answers = Answers(rows, {})
    tasks, questions = answers.scores(f"{SEEDS[0]}_perfect").shape
    scores = [
        [name.replace("_", " "), *[answers.interval(f"{kind}_{name}").in_percent() for kind in KINDS]]
        for name in METHODS
    ]
    pairs = [
        [f"{one} − {other}".replace("_", " "), over_seeds(answers, one, other)]
        + [answers.difference(f"{kind}_{one}", f"{kind}_{other}").in_percent() for kind in KINDS]
        for one, other in _PAIRS
    ]
    return "\n".join(
        [
            "## Other trainings of the same adapters\n",
            f"{tasks} tasks, {questions} questions each, pools of {tasks} adapters; percent and points with 95 %",
            f"intervals. `{SEEDS[1]}`, `{SEEDS[2]}`: other seeds. `{SCALES}`: steps at the whole scale and at a third",
            f"in turn. `{SLOW}`: a tenth of the learning rate.\n",
            table(["", *KINDS], scores),
            table(["points", "all seeds", *KINDS], pairs),
        ]
    )


def sentence(folder: Path) -> str:
    """Return how the mixture does after other trainings, and what a slower one changes of its loss."""
    if not (folder / ROWS).exists():
        return "Other trainings of the adapters were not measured yet."
    answers = Answers(pd.read_parquet(folder / ROWS), {})
    own, slow = (percent(answers.interval(f"{kind}_perfect").mean) for kind in (SEEDS[0], SLOW))
    losses = {kind: answers.difference(f"{kind}_mixture_iid", f"{kind}_selection_iid") for kind in (SCALES, SLOW)}
    return (
        f"On {len(answers.scores(f'{SEEDS[0]}_perfect'))} tasks the mixture changes right answers by"
        f" {over_seeds(answers, 'mixture_iid', 'selection_iid')} points against selection over three training seeds,"
        f" and by {losses[SCALES].in_percent()} if every second step trains at a third of the scale. Trained at a tenth"
        f" of the learning rate, own adapters have {slow} % in place of {own}, and the mixture changes right answers by"
        f" {losses[SLOW].in_percent()}. The loss is smaller than with the first seed by"
        f" {less_lost(answers).in_percent()} points."
    )


def less_lost(answers: Answers) -> Interval:
    """Return by how much less the mixture loses against selection after the slow training."""

    def loss(kind: str) -> np.ndarray:
        return (answers.scores(f"{kind}_selection_iid") - answers.scores(f"{kind}_mixture_iid")).to_numpy()

    return bootstrap((loss(SEEDS[0]) - loss(SLOW))[np.newaxis], resamples_tasks=True)


def train(specs: Sequence[TaskSpec], bench: Bench, root: Path) -> None:
    """Train the missing adapters of every kind."""
    source = Path(model_source(bench.asker.engine.config))
    for kind in KINDS[1:]:
        recipes = {spec.name: recipe_for(recipe_of(spec), kind) for spec in specs}
        with Progress() as progress:
            train_on(bench.study.parts, recipes, workspace_of(root, kind), source, progress)


def main(per_task: PerTask = 20, encoder: EncoderName = ENGLISH_MODEL, root: Root = DEFAULT_ROOT) -> None:
    """Train in every way, answer over every pool, write rows and the appendix."""
    bench = load_bench(Workspace(root), encoder, Console(width=120)).bench
    tasks = chosen_tasks(list(bench.study.specs.values()))
    few = replace(bench, study=replace(bench.study, specs={spec.name: spec for spec in tasks}))
    train(tasks, few, root)
    write_parquet(PAPER_RESULTS / ROWS, pa.concat_tables(list(all_rows(few, Encoder(encoder), root, per_task))))
    (PAPER_RESULTS / "recipes.md").write_text(section(pd.read_parquet(PAPER_RESULTS / ROWS)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
