"""BIG-bench tasks as the starter pool uses them: reading, rendering, a fixed split and exact-match scoring."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

NUM_TEST = 100
MAX_TRAIN = 850
MAX_INPUT_TOKENS = 160
MAX_ANSWER_TOKENS = 16


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that measuring lengths needs."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]: ...


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One line of a task list. `template` has {x} for the input and, if options are shown, {o}."""

    name: str
    path: str
    cluster: str
    template: str
    metric: str
    labels: tuple[str, ...] = ()
    num_steps: int = 60
    max_answer_tokens: int = MAX_ANSWER_TOKENS

    @property
    def shows_options(self) -> bool:
        return "{o}" in self.template


@dataclass(frozen=True, slots=True)
class Item:
    """A rendered input. All `answers` are accepted; training uses the first."""

    input: str
    answers: tuple[str, ...]
    num_options: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """Items in parts without common input texts."""

    train: tuple[Item, ...]
    test: tuple[Item, ...]


def read_specs(path: Path) -> list[TaskSpec]:
    """Read the task list of `path`, in its order."""
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))["tasks"]
    return [TaskSpec(**{**row, "labels": tuple(row.get("labels", ()))}) for row in rows]


def read_task_files(source: Path, paths: Collection[str]) -> dict[str, dict[str, Any]]:
    """Read these task.json files from the distribution's archive (in one pass) or its unpacked folder.

    Raises: FileNotFoundError, which names the missing tasks.
    """
    found = _read_folder(source, paths) if source.is_dir() else _read_archive(source, frozenset(paths))
    if missing := sorted(set(paths) - found.keys()):
        raise FileNotFoundError(f"{source} lacks {', '.join(missing)}")
    return found


def _read_folder(source: Path, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {path: json.loads((source / path).read_bytes()) for path in paths if (source / path).is_file()}


def _read_archive(source: Path, paths: frozenset[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with tarfile.open(source) as archive:
        for member in archive:
            if len(found) == len(paths):
                break
            inner = member.name.partition("/")[2]  # the first path component is the distribution's name and version
            if inner in paths and (stream := archive.extractfile(member)) is not None:
                found[inner] = json.load(stream)
    return found


def make_split(spec: TaskSpec, examples: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Split:
    """Make the task's fixed split: no duplicates, shuffled by a seed from its name, 100 items for the test."""
    rng = task_rng(spec.name)
    items = [render(spec, example, rng) for example in examples]
    rng.shuffle(items)
    unique = list({item.input: item for item in items}.values())
    short = short_items(spec, unique[: 2 * (NUM_TEST + MAX_TRAIN)], tokenizer)
    return Split(train=tuple(short[NUM_TEST : NUM_TEST + MAX_TRAIN]), test=tuple(short[:NUM_TEST]))


def task_rng(name: str) -> random.Random:
    """Return a random generator seeded by the task's name, so shuffles are equal in every run."""
    return random.Random(int(hashlib.md5(name.encode()).hexdigest(), 16))


def render(spec: TaskSpec, example: Mapping[str, Any], rng: random.Random) -> Item:
    """Render one example as the model sees it. Shuffle options by `rng` unless they are fixed labels."""
    scores: dict[str, float] = example.get("target_scores", {})
    options = list(spec.labels or scores)
    if not spec.labels:
        rng.shuffle(options)
    shown = "\n".join(f"- {option}" for option in options)
    text = spec.template.replace("{o}", shown).replace("{x}", example["input"].strip())
    is_choice = spec.shows_options or bool(spec.labels)
    answers = _best_options(scores) if is_choice and scores else _as_tuple(example["target"])
    return Item(text, answers, num_options=len(options) if is_choice else 0)


def _best_options(scores: Mapping[str, float]) -> tuple[str, ...]:
    best = max(scores.values())
    return tuple(option for option, score in scores.items() if score == best)


def _as_tuple(target: str | list[str]) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target)


def short_items(spec: TaskSpec, items: Sequence[Item], tokenizer: Tokenizer) -> list[Item]:
    """Return the items that have an answer and whose input and first answer have few enough tokens."""
    inputs = tokenizer([item.input for item in items], add_special_tokens=False)["input_ids"]
    answers = tokenizer([item.answers[0] for item in items], add_special_tokens=False)["input_ids"]
    lengths = zip(items, inputs, answers, strict=True)
    return [i for i, x, y in lengths if len(x) <= MAX_INPUT_TOKENS and 0 < len(y) <= spec.max_answer_tokens]


def is_right(item: Item, generated: str) -> bool:
    """Return whether the first line of `generated` equals an accepted answer, ignoring case and outer blanks."""
    said = _normal(generated.strip().partition("\n")[0])
    return any(said == _normal(answer) for answer in item.answers)


def majority_percent(items: Sequence[Item]) -> float:
    """Return the score of the better of two guesses: always the most common answer, or any of the options shown."""
    commonest = Counter(_normal(item.answers[0]) for item in items).most_common(1)[0][1]
    chance = sum(1 / item.num_options for item in items if item.num_options)
    return 100 * max(commonest, chance) / len(items)


def _normal(text: str) -> str:
    return text.strip().lower()
