"""The tasks on which the packaged encoder is trained: the `train` pools, and tasks of BIG-bench.

A file of `pools/train` has domains, whose tasks share contents, so that only what is asked tells them apart; or topics
and formats, of which every pair is a task. This project wrote them all. The tasks of BIG-bench are of families that
neither the starter pool, nor the study of the paper, nor a test has a task of. They have no instructions: their texts
are the inputs alone, and with options.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper.common.tasks import read_task_list
from benchmarks.routing.wording_pools import INPUT, POOLS
from benchmarks.training.bigbench_tasks import read_specs, task_rng

NUM_PLAIN, NUM_SHOWN = 20, 40  # inputs of each task, without their options and with them
MIN_EXAMPLES = 10
MAX_OF_FAMILY = 8  # tasks; two families have hundreds of near copies
MAX_CHARS = 1500
_PREFIX, _SUFFIX = "bigbench/benchmark_tasks/", "/task.json"
STARTER_TASKS = Path(__file__).parents[2] / "examples" / "starter_tasks.yaml"


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """A task in several wordings. `direct`: whole prompts without an instruction."""

    name: str
    contents: tuple[str, ...]
    wordings: tuple[str, ...] = (INPUT,)
    other: tuple[str, ...] = ()  # wordings in other languages
    direct: tuple[str, ...] = ()
    description: str = ""
    topic: str = ""
    form: str = ""


Domains = Mapping[str, Sequence[TrainingTask]]


def read_domains(folder: Path = POOLS / "train") -> dict[str, list[TrainingTask]]:
    """Return the written tasks by domain."""
    domains: dict[str, list[TrainingTask]] = {}
    for path in sorted(folder.glob("*.yaml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        for domain in data.get("domains", ()):
            domains[f"{path.stem}/{domain['name']}"] = [_task(row, domain) for row in domain["tasks"]]
        for pairs in data.get("crossed", ()):
            domains[f"{path.stem}/{pairs['name']}"] = list(_pairs(pairs))
    return domains


def _task(row: Mapping[str, Any], domain: Mapping[str, Any]) -> TrainingTask:
    found = dict(domain) | dict(row)  # what the tasks of a domain share stands there
    return TrainingTask(
        row["name"],
        tuple(found["contents"]),
        tuple(found["wordings"]),
        tuple(found.get("other", {}).values()),
        tuple(row.get("bare", ())),
        row.get("description", ""),
    )


def _pairs(data: Mapping[str, Any]) -> Iterator[TrainingTask]:
    for topic in data["topics"]:
        for form in data["formats"]:
            yield TrainingTask(
                f"{topic['name']}__{form['name']}",
                tuple(topic["contents"]),
                tuple(form["wordings"]),
                tuple(form.get("other", {}).values()),
                description=f"{topic.get('description', '')} {form.get('description', '')}".strip(),
                topic=topic["name"],
                form=form["name"],
            )


def known_paths() -> set[str]:
    """Return the files of all tasks of BIG-bench that a pool or a test of this repository uses."""
    listed = read_task_list()
    return {spec.path for spec in (*listed.tasks, *listed.spares, *read_specs(STARTER_TASKS))}


def family_of(path: str) -> str:
    """Return the top folder of a task, which its variants share."""
    return path.removeprefix(_PREFIX).partition("/")[0]


def other_domains(archive: Path) -> dict[str, list[TrainingTask]]:
    """Return tasks of BIG-bench outside the known families, by family."""
    families, examples = {family_of(path) for path in known_paths()}, dict(sorted(_read_examples(archive)))
    domains: dict[str, list[TrainingTask]] = {}
    counts: Counter[str] = Counter()
    for name, own in examples.items():
        family = family_of(name)
        counts[family] += 1
        if family not in families and counts[family] <= MAX_OF_FAMILY:
            plain, shown = plain_inputs(name, own)[:NUM_PLAIN], shown_inputs(name, own)[:NUM_SHOWN]
            task = TrainingTask(name, tuple(plain), direct=tuple(shown))
            domains.setdefault(f"BIG-bench/{family}", []).append(task)
    return domains


def _read_examples(archive: Path) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield (name, examples with a text as input) of every task of enough inputs in the source distribution."""
    with tarfile.open(archive) as source:
        for member in source:
            path = member.name.partition("/")[2]
            if not path.startswith(_PREFIX) or not path.endswith(_SUFFIX):
                continue
            stream = source.extractfile(member)
            assert stream is not None
            examples = json.load(stream).get("examples", [])
            texts = {e["input"] for e in examples if isinstance(e.get("input"), str) and e["input"].strip()}
            if len(texts) >= MIN_EXAMPLES:
                yield path.removeprefix(_PREFIX).removesuffix(_SUFFIX), examples


def plain_inputs(name: str, examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the distinct inputs in a random order that depends on the task's name."""
    inputs = [example.get("input") for example in examples]
    texts = list(dict.fromkeys(text for text in inputs if isinstance(text, str) and text.strip()))
    task_rng(name).shuffle(texts)
    return [text.strip()[:MAX_CHARS] for text in texts]


def shown_inputs(name: str, examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the distinct inputs in a random order that depends on the task's name, with their options in another."""
    rng, mixed = random.Random(name), list(examples)
    rng.shuffle(mixed)
    texts = []
    for example in mixed:
        text, options = example.get("input"), list(example.get("target_scores") or {})
        if isinstance(text, str) and text.strip():
            rng.shuffle(options)
            shown = "".join(f"\n- {option}" for option in options)
            texts.append((f"{text.strip()}\nOPTIONS:{shown}" if options else text.strip()).strip()[:MAX_CHARS])
    return list(dict.fromkeys(texts))
