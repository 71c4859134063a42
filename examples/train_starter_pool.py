"""Build the starter pool: a standard PEFT folder per task, its samples, held-out prompts and measured scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from rich.progress import Progress
from transformers import AutoTokenizer

from benchmarks.starter_pool import NUM_TRAINED, POOL
from benchmarks.training.adapter_files import load_base, save_adapter, write_items
from benchmarks.training.bigbench_tasks import (
    Split,
    TaskSpec,
    majority_percent,
    make_split,
    read_specs,
    read_task_files,
)
from benchmarks.training.greedy_evaluation import percent_right
from benchmarks.training.lora_training import Recipe, tokenize, train_adapter

NUM_HELDOUT = 12
TASK_LIST = Path(__file__).with_name("starter_tasks.yaml")


class Output:
    """The files of a task below the output folder. The task is complete once its line in the scores is written."""

    def __init__(self, root: Path, task: str) -> None:
        self._task = task
        self.adapter = root / "starter_pool" / task
        self.samples = self.adapter / "lora_samples.jsonl"
        self.heldout = root / "starter_heldout" / f"{task}.jsonl"
        self.scores = root / "starter_scores.jsonl"

    @property
    def is_complete(self) -> bool:
        lines = self.scores.read_text(encoding="utf-8").splitlines() if self.scores.is_file() else []
        return self._task in {json.loads(line)["task"] for line in lines}

    def append_scores(self, scores: Mapping[str, str | float]) -> None:
        with self.scores.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": self._task, **scores}) + "\n")


def train_task(model: Any, tokenizer: Any, spec: TaskSpec, split: Split, output: Output, progress: Progress) -> Any:
    """Write the task's adapter, samples and held-out prompts; return the base model without the adapter."""
    recipe = replace(Recipe(), num_steps=spec.num_steps)
    bar = progress.add_task(spec.name, total=recipe.num_steps)

    def show(loss: float) -> None:
        progress.update(bar, advance=1, description=f"{spec.name} loss {loss:.3f}")

    trained = train_adapter(model, tokenize(split.train, tokenizer), recipe, show)
    save_adapter(trained, output.adapter)
    write_items(output.samples, split.train[:NUM_TRAINED])
    append_other_words(output.samples, POOL / spec.name / output.samples.name)
    write_items(output.heldout, split.test[:NUM_HELDOUT], spec.labels)
    return trained.unload()


def append_other_words(samples: Path, published: Path) -> None:
    """Append the samples that were written by hand, which only the published pool has, if it has the task."""
    rows = published.read_text(encoding="utf-8").splitlines(keepends=True) if published.is_file() else []
    with samples.open("a", encoding="utf-8") as file:
        file.writelines(rows[NUM_TRAINED:])


def score_task(base: Any, tokenizer: Any, spec: TaskSpec, split: Split, output: Output) -> None:
    """Write the scores of the saved adapter and of the base model on the test items."""
    base_score = percent_right(base, tokenizer, split.test)
    adapted = PeftModel.from_pretrained(base, output.adapter).eval()
    adapter_score = percent_right(adapted, tokenizer, split.test)
    adapted.unload()
    measured = {"majority": round(majority_percent(split.test)), "base": base_score, "adapter": adapter_score}
    output.append_scores({"cluster": spec.cluster, "num_steps": spec.num_steps, **measured})


def main(
    bigbench: Annotated[Path, typer.Argument(help="The bigbench source distribution: its archive or unpacked folder.")],
    base_model: Annotated[Path, typer.Argument(help="Folder of the base model (transformers format).")],
    output: Annotated[Path, typer.Argument(help="Folder that gets the pool, the held-out prompts and the scores.")],
    only: Annotated[list[str] | None, typer.Option(help="Train this task only; may be given again.")] = None,
    task_list: Annotated[Path, typer.Option(help="The task list.")] = TASK_LIST,
    num_threads: Annotated[
        int | None, typer.Option(help="Threads of one process; one is best on a busy machine.")
    ] = None,
) -> None:
    """Train and score incomplete adapters, and show the progress."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    wanted = [spec for spec in read_specs(task_list) if not only or spec.name in only]
    specs = [spec for spec in wanted if not Output(output, spec.name).is_complete]
    files = read_task_files(bigbench, [spec.path for spec in specs])
    tokenizer = AutoTokenizer.from_pretrained(base_model, padding_side="left")
    base = load_base(base_model)
    with Progress() as progress:
        for spec in specs:
            split = make_split(spec, files[spec.path]["examples"], tokenizer)
            place = Output(output, spec.name)
            base = train_task(base, tokenizer, spec, split, place, progress)
            score_task(base, tokenizer, spec, split, place)


if __name__ == "__main__":
    typer.run(main)
