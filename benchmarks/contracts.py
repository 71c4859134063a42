"""Measure what contracts are worth: `python -m benchmarks.contracts`, or `--study` for the tasks of the paper's study.

All prompts of a task may have one beginning or end, which is its instruction. It is taken off the held-out prompts and
the samples, as users write who do not know it, and becomes the contract of the task's adapter. Greedy answers count as
right if they are the expected ones; the study's free texts have ROUGE-L. About five minutes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.paper.common.scoring import score
from benchmarks.paper.common.tasks import load_parts, read_pool, read_task_list
from benchmarks.paper.common.workspace import Workspace
from benchmarks.results_file import write_results
from benchmarks.starter_pool import HELD_OUT, NUM_TRAINED, POOL
from benchmarks.training.bigbench_tasks import Item
from deployments.batch.offline import LoraRetriever
from deployments.config.app import AppConfig
from deployments.publishing.contract_files import read_contract
from deployments.publishing.evaluation import score_answer
from deployments.retriever_factory import live_pool
from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import model_source
from lora_store import LoraStore
from retriever_svc import embed_groups

MAX_TOKENS = 40
WHOLE, STRIPPED, CONTRACT = "whole prompt", "stripped", "stripped, contract"
MODELS = ("the adapter", "auto")
Arm = tuple[str, str]
"""How the prompts are written, and the model."""
ARMS: tuple[Arm, ...] = tuple(product((WHOLE, STRIPPED, CONTRACT), MODELS))
out = Console(width=120)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What all prompts of a task have around the user's text."""

    head: str
    tail: str

    def strip(self, text: str) -> str:
        return text.removeprefix(self.head).removesuffix(self.tail)

    @property
    def contract(self) -> str:
        """The contract as JSON, "" without an instruction."""
        has_any = self.head or self.tail
        return json.dumps({"instruction": f"{self.head}{{input}}{self.tail}"}) if has_any else ""


def find_instruction(texts: Sequence[str]) -> Instruction:
    """Return the whole words, and marks at the end, that begin and end every text."""
    head = _common_beginning(texts)
    head = head[: max(head.rfind(" "), head.rfind("\n")) + 1]
    tail = _common_beginning([text[len(head) :][::-1] for text in texts])[::-1]
    starts = [place for place in (tail.find(" "), tail.find("\n")) if place >= 0]
    return Instruction(head, tail[min(starts, default=len(tail)) :])


def _common_beginning(texts: Sequence[str]) -> str:
    same = [len(set(chars)) == 1 for chars in zip(*texts, strict=False)]
    return texts[0][: [*same, False].index(False)]


@dataclass(frozen=True, slots=True)
class Task:
    """An adapter's folder, the prompts to ask, what all prompts of the task have, and how its answers are scored."""

    folder: Path
    items: Sequence[Item]
    instruction: Instruction
    score: Callable[[Item, str], float]


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_samples(adapter: Path) -> list[dict[str, str]]:
    """Return the samples in the wording of the training; the others do not have the instruction."""
    return read_rows(adapter / "lora_samples.jsonl")[:NUM_TRAINED]


def read_starter() -> dict[str, Task]:
    """Return the tasks of the starter pool."""
    tasks = {}
    for path in sorted(HELD_OUT.glob("*.jsonl")):
        rows, folder = read_rows(path), POOL / path.stem
        items = [Item(row["input"], (row["output"],)) for row in rows]
        instruction = find_instruction([row["input"] for row in (*rows, *read_samples(folder))])
        tasks[path.stem] = Task(folder, items, instruction, lambda item, text: score_answer(text, item.answers[0]))
    return tasks


def read_study() -> dict[str, Task]:
    """Return the tasks of the paper's study, whose adapters are trained already."""
    workspace, listed = Workspace(), read_task_list().by_name
    specs = [listed[name] for name in read_pool()]
    parts = load_parts(specs, workspace, AutoTokenizer.from_pretrained(model_source(WorkerConfig())))
    tasks = {}
    for spec in specs:
        own = parts[spec.name]
        instruction = find_instruction([item.input for item in (*own.train, *own.samples, *own.test)])
        tasks[spec.name] = Task(workspace.adapters / spec.name, own.test, instruction, partial(score, spec))
    return tasks


def publish(config: AppConfig, tasks: Mapping[str, Task], folder: Path) -> None:
    """Publish every adapter with stripped samples and its contract. `folder`: for copies of the adapters' folders."""
    bases, staged = config.served_model.accepted_names, []
    store = LoraStore(config.store_uri, accepts_base=bases, read_contract=read_contract)
    for name, task in tasks.items():
        copied = Path(shutil.copytree(task.folder, folder / name))
        rows = read_samples(copied)
        lines = [json.dumps({**row, "input": task.instruction.strip(row["input"])}) + "\n" for row in rows]
        (copied / "lora_samples.jsonl").write_text("".join(lines), encoding="utf-8")
        staged.append(store.stage(copied, contract=task.instruction.contract))
    embeddings = embed_groups(live_pool(config, store.snapshot).current.encoder, [item.samples for item in staged])
    store.commit(staged, embeddings, [1.0] * len(staged), "benchmark")


def ask(offline: LoraRetriever, tasks: Mapping[str, Task], per_task: int) -> dict[Arm, np.ndarray]:
    """Return for each arm the score of each answer, and whether its own adapter leads, (2, tasks, prompts)."""
    asked = [(name, item) for name, task in tasks.items() for item in task.items[:per_task]]
    requests = {arm: [_request(arm, name, tasks[name], item) for name, item in asked] for arm in ARMS}
    different = list(dict.fromkeys(request for own in requests.values() for request in own))
    options = [json.loads(lora) for _, lora in different]
    answers = offline.generate([text for text, _ in different], options, max_tokens=MAX_TOKENS, temperature=0)
    assert not any(answer.error for answer in answers), "every prompt is answered"
    answer_to, found = dict(zip(different, answers, strict=True)), dict[Arm, np.ndarray]()
    for arm, own in requests.items():
        pairs = list(zip(asked, [answer_to[request] for request in own], strict=True))
        scores = [tasks[name].score(item, answer.text) for (name, item), answer in pairs]
        first = [[used["name"] for used in answer.adapters][:1] == [name] for (name, _), answer in pairs]
        found[arm] = np.array([scores, first], float).reshape(2, len(tasks), per_task)
    return found


def _request(arm: Arm, name: str, task: Task, item: Item) -> tuple[str, str]:
    """Return the text and, as JSON, the options. Arms that ask the same have equal ones."""
    written, model = arm
    text = item.input if written == WHOLE else task.instruction.strip(item.input)
    may_apply = model == "auto" or task.instruction.contract
    lora = {} if model == "auto" else {"adapters": [{"name": name}]}
    return text, json.dumps(lora | {"contract": bool(may_apply) and written == CONTRACT})


def show(found: Mapping[Arm, np.ndarray], has_contract: Sequence[bool]) -> tuple[str, dict[str, Interval]]:
    """Return a table of the arms and of their differences, in percent, and the intervals in it by name."""
    groups = {"of tasks with an instruction": np.array(has_contract), "of all tasks": np.ones(len(has_contract), bool)}
    table = Table("prompt", "model", *(f"right, {group}" for group in groups), "right adapter first")
    figures: dict[str, Interval] = {}

    def add(written: str, model: str, values: np.ndarray) -> None:
        shares = {group: bootstrap(values[:1, kept]) for group, kept in groups.items()}
        figures.update({f"{written}, {model}, {group}": share for group, share in shares.items()})
        first = bootstrap(values[1:, groups["of tasks with an instruction"]]).in_percent()
        table.add_row(written, model, *(share.in_percent() for share in shares.values()), first)

    for (written, model), values in found.items():
        add(written, model, values)
    for other, model in product((STRIPPED, WHOLE), MODELS):
        add(f"{CONTRACT} − {other}", model, found[CONTRACT, model] - found[other, model])
    with out.capture() as captured:
        out.print(table)
    return captured.get(), figures


def main(
    study: Annotated[bool, typer.Option(help="the adapters that benchmarks.paper.pool.train_pool has trained")] = False,
    per_task: Annotated[int, typer.Option(help="held-out prompts of each task")] = 12,
) -> None:
    """Measure, print the table and write results/contracts, or results/contracts_study."""
    tasks = read_study() if study else read_starter()
    per_task = min([per_task, *(len(task.items) for task in tasks.values())])  # intervals need as many of each
    has_contract = [bool(task.instruction.contract) for task in tasks.values()]
    with tempfile.TemporaryDirectory() as folder:
        config = AppConfig(store_uri=f"{folder}/pool")
        publish(config, tasks, Path(folder))
        with LoraRetriever(config) as offline:
            found = ask(offline, tasks, per_task)
    text, figures = show(found, has_contract)
    text += f"{sum(has_contract)} of {len(tasks)} tasks have an instruction; {per_task} prompts of each task.\n"
    out.print(text)
    means = {name: share.mean for name, share in figures.items()}
    write_results(f"contracts{'_study' * study}", figures=means, table=text, runs=[{"intervals": figures}])


if __name__ == "__main__":
    typer.run(main)
