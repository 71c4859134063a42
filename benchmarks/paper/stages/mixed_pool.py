"""Compare a pool of mixed ranks, modules and scalings with the uniform pool: `... benchmarks.paper.stages.mixed_pool`.

The tasks of a few clusters are trained again on the same examples, with recipes in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper.answering.methods import Perfect, Routed
from benchmarks.paper.answering.runs import Bench, Method, pool_retriever, run_all
from benchmarks.paper.answering.study import Study, load_asker
from benchmarks.paper.common.markdown import percent, table
from benchmarks.paper.common.options import EncoderName, PerTask, Root
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import NUM_TEST
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.pool.train_pool import recipe_of, train_on
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.main_table import load_bench
from benchmarks.training.bigbench_tasks import TaskSpec
from benchmarks.training.lora_training import LINEAR_NAMES, Recipe
from gpu_worker.model.base_model import model_source
from retriever_svc import Encoder
from retriever_svc.encoder_files import ENGLISH_MODEL

ROWS = "mixed_pool.parquet"
NUM_CLUSTERS, NUM_OF_CLUSTER = 3, 4
MOST_RANK = 16
_MLP = ("gate_proj", "up_proj", "down_proj")
_RECIPE = Recipe()
VARIANTS: dict[str, Recipe] = {  # scalings of 2, as in the uniform pool, or close to it
    "rank 3, all modules": replace(_RECIPE, rank=3, lora_alpha=6),
    "rank 16, q and v": replace(_RECIPE, rank=MOST_RANK, lora_alpha=32, modules=("q_proj", "v_proj")),
    "rank 8, MLP, rsLoRA": replace(_RECIPE, rank=8, lora_alpha=6, use_rslora=True, modules=_MLP),
    "rank 12, all modules, rsLoRA": replace(_RECIPE, rank=12, lora_alpha=7, use_rslora=True, modules=LINEAR_NAMES),
}
METHODS: dict[str, Method] = {
    "perfect": Perfect(),
    "selection_iid": Routed("selection", 1),
    "mixture_iid": Routed("mixture"),
    "fusion_iid": Routed("fusion"),
    "selection_ood": Routed("selection", 1, masks_own=True),
    "mixture_ood": Routed("mixture", masks_own=True),
    "fusion_ood": Routed("fusion", masks_own=True),
}
KINDS = ("uniform", "mixed")


def chosen_tasks(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Return the first tasks of the largest clusters, because related tasks are composed."""
    largest = [cluster for cluster, _ in Counter(spec.cluster for spec in specs).most_common(NUM_CLUSTERS)]
    return [spec for name in largest for spec in [s for s in specs if s.cluster == name][:NUM_OF_CLUSTER]]


def variants_of(tasks: Sequence[str]) -> dict[str, str]:
    """Return, by task, the name of its recipe. Recipes take turns, so that related tasks differ."""
    names = list(VARIANTS)
    return {task: names[number % len(names)] for number, task in enumerate(tasks)}


def mixed_recipe(spec: TaskSpec, variant: str) -> Recipe:
    """Return the task's own recipe with the rank, modules and scaling of the variant."""
    other = VARIANTS[variant]
    shape = {"rank": other.rank, "lora_alpha": other.lora_alpha, "use_rslora": other.use_rslora}
    return replace(recipe_of(spec), **shape, modules=other.modules)


def pool_rows(bench: Bench, encoder: Encoder, kind: str, per_task: int) -> pa.Table:
    """Return rows of every method over exactly the adapters of the bench's tasks; `kind` of pool is in run names."""
    study = bench.study
    own = replace(bench, retriever=pool_retriever(study, bench.asker, encoder, f"{kind}-few"))
    methods = {f"{kind}_{name}": method for name, method in METHODS.items()}
    return run_all(own, methods, per_task, study.workspace.rows / "mixed_pool")


def mixed_bench(bench: Bench, study: Study, workspace: Workspace) -> Bench:
    """Return a bench with the same questions over the adapters in `workspace`, in its own engine."""
    config = bench.asker.engine.config
    wide = replace(config, bank_rank_rows=max(config.bank_rank_rows, MOST_RANK * len(study.specs)))
    asker, _, _ = load_asker(workspace, wide, list(study.specs))
    return replace(bench, study=replace(study, workspace=workspace), asker=asker)


def section(rows: pd.DataFrame, variants: dict[str, str]) -> str:
    """Return the report's section."""
    answers = Answers(rows, {})
    runs = [
        [
            name.replace("_", " "),
            *[answers.interval(f"{kind}_{name}").in_percent() for kind in KINDS],
            answers.difference(f"mixed_{name}", f"uniform_{name}").in_percent(),
        ]
        for name in METHODS
    ]
    own = []
    for variant in dict.fromkeys(variants.values()):
        tasks = [task for task, name in variants.items() if name == variant]
        means = [answers.scores(f"{kind}_perfect").loc[tasks].to_numpy().mean() for kind in KINDS]
        own.append([variant, str(len(tasks)), *map(percent, means)])
    return "\n".join(
        [
            "## A pool of mixed ranks, modules and scalings\n",
            f"{len(variants)} tasks; k = 3; percent with 95 % intervals. Fusion pads the smaller ranks with zeros.\n",
            table(["", *[f"{kind} pool" for kind in KINDS], "mixed − uniform"], runs),
            "Own adapters by recipe:\n",
            table(["recipe in the mixed pool", "tasks", *[f"{kind} pool" for kind in KINDS]], own),
        ]
    )


def main(
    per_task: PerTask = NUM_TEST,
    encoder: EncoderName = ENGLISH_MODEL,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Train the mixed pool, answer over both pools, write rows and the report's section."""
    workspace, reader = Workspace(root), Encoder(encoder)
    bench = load_bench(workspace, encoder, Console(width=120)).bench
    tasks = chosen_tasks(list(bench.study.specs.values()))
    study = replace(bench.study, specs={spec.name: spec for spec in tasks})
    variants, mixed = variants_of(list(study.specs)), Workspace(root / "mixed_pool")
    recipes = {spec.name: mixed_recipe(spec, variants[spec.name]) for spec in tasks}
    with Progress() as progress:
        train_on(study.parts, recipes, mixed, Path(model_source(bench.asker.engine.config)), progress)
    few = replace(bench, study=study)
    parts = [pool_rows(few, reader, "uniform", per_task)]
    parts.append(pool_rows(mixed_bench(few, study, mixed), reader, "mixed", per_task))
    write_parquet(PAPER_RESULTS / ROWS, pa.concat_tables(parts))
    text = section(pd.read_parquet(PAPER_RESULTS / ROWS), variants)
    (PAPER_RESULTS / "mixed_pool.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
