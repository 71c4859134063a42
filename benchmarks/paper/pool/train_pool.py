"""Train the study's adapters on the base model, task by task. Several processes share the list."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock, Timeout
from peft import PeftModel
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from benchmarks.paper.common.options import Root
from benchmarks.paper.common.tasks import Parts, load_parts, read_pool, read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, Workspace
from benchmarks.paper.training.lower_layers import lower_layers
from benchmarks.paper.training.packing import Packed
from benchmarks.training.adapter_files import BASE_NAME, load_base, save_adapter, write_items
from benchmarks.training.bigbench_tasks import TaskSpec
from benchmarks.training.lora_training import Recipe, batches, tokenize, train_adapter
from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import model_source

PAPER_RECIPE = Recipe(scales=(1.0,), batch_tokens=256, learnt_loss=0.05)
_STEPS = {"acc": 80, "em": 50, "rouge_l": 50}  # the content of answers takes longer to learn than their form


def choose_recipe(spec: TaskSpec, recipe: Recipe = PAPER_RECIPE) -> Recipe:
    return replace(recipe, num_steps=_STEPS[spec.metric])


def in_turns(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Return one task of every cluster, then the second ones, so that all kinds are trained early."""
    place: Counter[str] = Counter()
    turns = []
    for number, spec in enumerate(specs):
        turns.append((place[spec.cluster], number, spec))
        place[spec.cluster] += 1
    return [spec for _, _, spec in sorted(turns, key=lambda turn: turn[:2])]


class AdapterFolder:
    """The location of a task's PEFT folder. The folder exists once it is complete."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.path = workspace.adapters / name
        self._scratch = workspace.adapters / f".{name}"
        self.lock = FileLock(workspace.adapters / f".{name}.lock", blocking=False)

    def write(self, model: PeftModel, parts: Parts, base_name: str) -> None:
        """Write the trained adapter with its samples."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        save_adapter(model, self._scratch, base_name)
        write_items(self._scratch / "lora_samples.jsonl", parts.samples)
        self._scratch.rename(self.path)


class Trainer:
    """The base model, used for one adapter after the other."""

    def __init__(self, base: Any, tokenizer: Any, base_name: str = BASE_NAME) -> None:
        self._base, self._tokenizer, self._base_name = base, tokenizer, base_name

    def train(self, folder: AdapterFolder, parts: Parts, recipe: Recipe, progress: Progress) -> None:
        """Train an adapter on `parts.train` and write it to `folder`."""
        bar = progress.add_task(folder.path.name, total=recipe.num_steps)

        def show(loss: float) -> None:
            progress.update(bar, advance=1, description=f"{folder.path.name} loss {loss:.3f}")

        examples = tokenize(parts.train, self._tokenizer)
        packed = Packed(examples, self._base.config)
        upcoming = [one for batch in islice(batches(examples, recipe, packed), recipe.num_steps) for one in batch]
        with lower_layers(packed, self._base.model, recipe.first_layer, upcoming) as layout:
            trained = train_adapter(self._base, examples, recipe, show, layout)
        folder.write(trained, parts, self._base_name)
        self._base = trained.unload()
        progress.remove_task(bar)


def train_all(
    specs: Sequence[TaskSpec],
    workspace: Workspace,
    source: Path,
    progress: Progress,
    choose_recipe: Callable[[TaskSpec], Recipe] = choose_recipe,
) -> None:
    """Train an adapter for every task of `specs` that has none, unless another process is training it."""
    todo = untrained(specs, workspace)
    parts = load_parts(todo, workspace, AutoTokenizer.from_pretrained(source))
    train_on(parts, {spec.name: choose_recipe(spec) for spec in todo}, workspace, source, progress)


def untrained(specs: Sequence[TaskSpec], workspace: Workspace) -> list[TaskSpec]:
    """Return the tasks without an adapter folder."""
    return [spec for spec in specs if not AdapterFolder(workspace, spec.name).path.exists()]


def train_on(
    parts: Mapping[str, Parts],
    recipes: Mapping[str, Recipe],
    workspace: Workspace,
    source: Path,
    progress: Progress,
    base_name: str = BASE_NAME,
) -> None:
    """Train an adapter for every name of `recipes` on the part `train`, unless another process is training it.

    `source`: the folder of the base model, which the adapters call `base_name`.
    """
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    todo = [name for name in recipes if not AdapterFolder(workspace, name).path.exists()]
    if not todo:
        return
    trainer = Trainer(load_base(source), AutoTokenizer.from_pretrained(source), base_name)
    bar = progress.add_task("steps of all adapters", total=sum(recipes[name].num_steps for name in todo))
    for name in todo:
        folder, recipe = AdapterFolder(workspace, name), recipes[name]
        try:
            with folder.lock:
                if not folder.path.exists():
                    started = time.perf_counter()
                    trainer.train(folder, parts[name], recipe, progress)
                    pace_s = (time.perf_counter() - started) / recipe.num_steps
                    progress.console.print(f"{name}: {pace_s:.2f} s/step", markup=False)
        except Timeout:
            progress.console.print(f"{name}: another process trains it", markup=False)
        progress.advance(bar, recipe.num_steps)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="this task only, which may be a spare; may be given again")
    ] = None,
    num_threads: Annotated[
        int | None, typer.Option(help="threads of this process; several processes may run at once")
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Train the missing adapters. An interrupted run continues with its task."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    listed = read_task_list()
    names = only or read_pool()
    specs = in_turns([listed.by_name[name] for name in names])
    with Progress(*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        train_all(specs, Workspace(root), Path(model_source(WorkerConfig())), progress)


if __name__ == "__main__":
    typer.run(main)
