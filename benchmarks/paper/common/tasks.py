"""The study's tasks: the list, the bare rendering, and four disjoint parts of each task by a fixed seed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper.common.workspace import Workspace, fetch_archive
from benchmarks.training.bigbench_tasks import Item, TaskSpec, Tokenizer, read_task_files, render, short_items, task_rng

TASK_LIST = Path(__file__).with_name("tasks.yaml")
POOL_FILE = TASK_LIST.with_name("pool.json")
NUM_TEST, NUM_CHOICE, NUM_SAMPLES, MAX_TRAIN = 50, 50, 20, 800
_READ = 2 * (NUM_TEST + NUM_CHOICE + NUM_SAMPLES + MAX_TRAIN)  # inputs read before long ones are dropped
_BARE, _BARE_OPTIONS = "{x}", "{x}\nOPTIONS:\n{o}"


def read_pool(path: Path = POOL_FILE) -> list[str]:
    """Return the tasks of the fixed pool: those whose adapters beat guessing on the choice part."""
    return list(json.loads(path.read_text(encoding="utf-8"))["pool"])


@dataclass(frozen=True, slots=True)
class TaskList:
    """The listed tasks, and the spares that may replace one or let the pool grow."""

    tasks: tuple[TaskSpec, ...]
    spares: tuple[TaskSpec, ...]

    @property
    def by_name(self) -> dict[str, TaskSpec]:
        return {spec.name: spec for spec in (*self.tasks, *self.spares)}


@dataclass(frozen=True, slots=True)
class Parts:
    """A task's examples. No input is in two parts.

    `train`: for the adapter; `samples`: for its embedding and the encoder's training; `choice`: for every decision;
    `test`: for the results only.
    """

    train: tuple[Item, ...]
    samples: tuple[Item, ...]
    choice: tuple[Item, ...]
    test: tuple[Item, ...]


@lru_cache(maxsize=2)
def read_task_list(path: Path = TASK_LIST) -> TaskList:
    """Read the list of `path`, in its order. The file is read once in a process."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    tasks, spares = (tuple(_spec(row) for row in content[key]) for key in ("tasks", "spares"))
    return TaskList(tasks, spares)


def _spec(row: Mapping[str, Any]) -> TaskSpec:
    rest = {key: value for key, value in row.items() if key not in ("path", "shows_options", "labels")}
    return TaskSpec(
        path=f"bigbench/benchmark_tasks/{row['path']}/task.json",
        template=_BARE_OPTIONS if row.get("shows_options") else _BARE,
        labels=tuple(row.get("labels", ())),
        **rest,
    )


def make_parts(spec: TaskSpec, examples: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Parts:
    """Make the task's fixed parts: shuffled by its name, one example per input, without long ones.

    Inputs that differ only in case, blanks or the order of options are equal. Small tasks have fewer examples in
    `choice`, so that two thirds of those outside test and samples are for training.
    """
    rng = task_rng(spec.name)
    pairs = [(_key(example), render(spec, example, rng)) for example in examples]
    rng.shuffle(pairs)
    first: dict[str, Item] = {}
    for key, item in pairs:
        first.setdefault(key, item)
    short = short_items(spec, list(first.values())[:_READ], tokenizer)
    num_choice = min(NUM_CHOICE, max(0, len(short) - NUM_TEST - NUM_SAMPLES) // 3)
    ends = [NUM_TEST, NUM_TEST + num_choice, NUM_TEST + num_choice + NUM_SAMPLES]
    test, choice, samples = short[: ends[0]], short[ends[0] : ends[1]], short[ends[1] : ends[2]]
    train = short[ends[2] : ends[2] + MAX_TRAIN]
    return Parts(tuple(train), tuple(samples), tuple(choice), tuple(test))


def _key(example: Mapping[str, Any]) -> str:
    return " ".join(example["input"].split()).casefold()


def load_parts(specs: Sequence[TaskSpec], workspace: Workspace, tokenizer: Tokenizer) -> dict[str, Parts]:
    """Return each task's parts by name: from the workspace, or made from the source distribution and saved there."""
    places = {spec.name: _place(workspace, spec) for spec in specs}
    missing = [spec for spec in specs if not places[spec.name].exists()]
    if missing:
        files = read_task_files(fetch_archive(workspace), [spec.path for spec in missing])
        for spec in missing:
            _write(places[spec.name], make_parts(spec, files[spec.path]["examples"], tokenizer))
    return {name: _read(path) for name, path in places.items()}


def _place(workspace: Workspace, spec: TaskSpec) -> Path:
    """Return the file of the parts. Its name depends on the task's line in the list: a changed line is split again."""
    digest = hashlib.sha256(repr(spec).encode()).hexdigest()[:8]
    return workspace.splits / f"{spec.name}-{digest}.json"


def _write(path: Path, parts: Parts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")  # concurrent training processes may all create it
    scratch.write_text(json.dumps(asdict(parts), ensure_ascii=False), encoding="utf-8")
    scratch.rename(path)


def _read(path: Path) -> Parts:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Parts(**{field.name: tuple(_item(row) for row in content[field.name]) for field in fields(Parts)})


def _item(row: Mapping[str, Any]) -> Item:
    return Item(row["input"], tuple(row["answers"]), row["num_options"])
