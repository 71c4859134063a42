"""Ask the starter pool in people's own words: `python -m benchmarks.routing.own_words`. About six minutes.

`starter_own_words.jsonl` has prompts for each adapter as people type them, everyday prompts, and prompts near a task of
the pool that are for no adapter. They were written before the samples in other words. The pool is published with its
training inputs alone as samples, and with all of its samples. `auto` chooses with the server's defaults, and greedy
answers are compared with the expected ones. `--part tune` was for choosing samples; results are those of `test`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import write_results
from benchmarks.starter_pool import NUM_TRAINED, POOL
from deployments.batch.offline import Generated, LoraRetriever
from deployments.config.app import AppConfig
from deployments.publishing.contract_files import read_contract
from deployments.retriever_factory import live_pool
from lora_store import LoraStore
from retriever_svc import embed_groups

PROMPTS = Path(__file__).with_name("starter_own_words.jsonl")
SAMPLES = {"training inputs": NUM_TRAINED, "all": None}
MAX_TOKENS = 24
OTHERS = ("everyday", "neighbour")  # kinds of prompts that are for no adapter
out = Console(width=140)


@dataclass(frozen=True, slots=True)
class OwnWords:
    """A prompt. `task`: the adapter that it is for, None for the base model; `answers`: the right ones."""

    kind: str
    task: str | None
    input: str
    answers: tuple[str, ...]

    def is_answered_by(self, text: str) -> bool:
        """Return whether the first line of `text` is a right answer, by its letters and digits."""
        said = _normal(text.strip().partition("\n")[0])
        return any(said == _normal(answer) for answer in self.answers)


def read_own_words(part: str) -> list[OwnWords]:
    """Return the prompts of a part, `tune` or `test`."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [
        OwnWords(row["kind"], row.get("task"), row["input"], tuple(row.get("answers", ())))
        for row in rows
        if row["part"] == part
    ]


def _normal(text: str) -> str:
    return re.sub(r"\W", "", text.casefold())


def publish(config: AppConfig, pool: Path, folder: Path, num_samples: int | None) -> None:
    """Publish the adapters of `pool` with their first samples, None for all. `folder`: for their copies."""
    staged = []
    store = LoraStore(config.store_uri, accepts_base=config.served_model.accepted_names, read_contract=read_contract)
    for adapter in sorted(path for path in pool.iterdir() if path.is_dir()):
        copied = Path(shutil.copytree(adapter, folder / adapter.name))
        samples = copied / "lora_samples.jsonl"
        lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
        samples.write_text("".join(lines[:num_samples]), encoding="utf-8")
        staged.append(store.stage(copied))
    embeddings = embed_groups(live_pool(config, store.snapshot).current.encoder, [item.samples for item in staged])
    store.commit(staged, embeddings, [1.0] * len(staged), "benchmark")


def measure(config: AppConfig, prompts: Sequence[OwnWords]) -> Iterator[Mapping[str, Any]]:
    """Yield what each prompt gets: the best adapter without abstention, that of `auto`, and whether answers are right.

    `named_right` is of the adapter that the prompt is for, asked by name.
    """
    texts = [prompt.input for prompt in prompts]
    with LoraRetriever(config) as offline:

        def ask(lora: Sequence[Mapping[str, Any]], max_tokens: int = MAX_TOKENS) -> list[Generated]:
            return offline.generate(texts, lora, max_tokens=max_tokens, temperature=0)

        nearest = ask([{"abstain": "never", "k": 1}] * len(texts), max_tokens=1)
        chosen = ask([{}] * len(texts))
        named = ask([{"adapters": [{"name": prompt.task}]} if prompt.task else {} for prompt in prompts])
    for prompt, first, auto, own in zip(prompts, nearest, chosen, named, strict=True):
        yield {
            "kind": prompt.kind,
            "task": prompt.task,
            "input": prompt.input,
            "first": _best(first),
            "auto": _best(auto),
            "auto_right": prompt.is_answered_by(auto.text),
            "named_right": prompt.is_answered_by(own.text),
            "answer": auto.text.strip().partition("\n")[0],
        }


def _best(answer: Generated) -> str | None:
    best = max(answer.adapters, key=lambda used: used["weight"], default=None)
    return None if best is None else best["name"]


def count_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the shares: of the prompts for adapters, and of the others those that the base model answers."""
    own = [row for row in rows if row["task"] is not None]
    shares = {
        "first": _share([row["first"] == row["task"] for row in own]),
        "right": _share([row["auto"] == row["task"] for row in own]),
        "wrong": _share([row["auto"] not in (row["task"], None) for row in own]),
        "answer_right": _share([row["auto_right"] for row in own]),
        "named_answer_right": _share([row["named_right"] for row in own]),
    }
    return shares | {
        f"{kind}_away": _share([row["auto"] is None for row in rows if row["kind"] == kind]) for kind in OTHERS
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def main(
    part: Annotated[str, typer.Option(help="tune or test")] = "test",
    pool: Annotated[Path, typer.Option(help="a folder as examples/starter_pool; of another, write no results")] = POOL,
) -> None:
    """Measure both pools, print the tables and write results/own_words."""
    prompts = read_own_words(part)
    tasks = sorted({prompt.task for prompt in prompts if prompt.task})
    by_samples = {}
    for name, num_samples in SAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = AppConfig(store_uri=f"{folder}/pool")
            publish(config, pool, Path(folder), num_samples)
            by_samples[name] = list(measure(config, prompts))
    shares = {name: count_shares(rows) for name, rows in by_samples.items()}
    table = Table("samples", *shares["all"], title=f"{len(prompts)} prompts of `{part}`")
    for name, found in shares.items():
        table.add_row(name, *(f"{value:.3f}" for value in found.values()))
    by_task = Table("task", *(f"{name}: {what}" for name in shares for what in ("right", "answer_right", "named")))
    for task in tasks:
        own = [count_task_shares(rows, task) for rows in by_samples.values()]
        by_task.add_row(task, *(f"{value:.2f}" for found in own for value in found))
    with out.capture() as captured:
        out.print(table)
        out.print(by_task)
    out.print(captured.get())
    if (part, pool) == ("test", POOL):
        figures = {
            f"{name.replace(' ', '_')}_{figure}": value
            for name, found in shares.items()
            for figure, value in found.items()
        }
        runs = [{"samples": name} | dict(row) for name, rows in by_samples.items() for row in rows]
        write_results("own_words", figures=figures, table=captured.get(), runs=runs)
    else:
        for row in by_samples["all"]:
            if row["auto"] != row["task"] or (row["task"] and not row["auto_right"]):
                out.print(json.dumps(row, ensure_ascii=False), markup=False, highlight=False, soft_wrap=True)


def count_task_shares(rows: Sequence[Mapping[str, Any]], task: str) -> list[float]:
    """Return the shares of a task's prompts: its adapter answers, rightly, and rightly where it is named."""
    own = [row for row in rows if row["task"] == task]
    return [
        _share([row["auto"] == task for row in own]),
        _share([row["auto_right"] for row in own]),
        _share([row["named_right"] for row in own]),
    ]


if __name__ == "__main__":
    typer.run(main)
