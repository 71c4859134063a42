"""Measure what contracts are worth: `python -m benchmarks.contracts`.

All prompts of a task may have one beginning or end, which is its instruction. It is taken off the held-out prompts and
the samples, as users write who do not know it, and becomes the contract of the task's adapter. Greedy answers that are
the expected ones count as right. Tasks without an instruction only compete for prompts. About five minutes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.common.intervals import Interval, bootstrap
from benchmarks.results_file import write_results
from benchmarks.starter_pool import HELD_OUT, NUM_TRAINED, POOL
from deployments.batch.offline import Generated, LoraRetriever
from deployments.config.app import AppConfig
from deployments.publishing.contract_files import read_contract
from deployments.publishing.evaluation import score_of
from deployments.retriever_factory import live_pool
from lora_store import LoraStore
from retriever_svc import embed_groups

MAX_TOKENS = 40
ASKED = {"whole prompt": False, "stripped": False, "stripped, contract": True}  # whether contracts apply
Rows = Sequence[Mapping[str, Any]]
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


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_samples(adapter: Path) -> Rows:
    """Return the samples in the wording of the training; the others do not have the instruction."""
    return read_rows(adapter / "lora_samples.jsonl")[:NUM_TRAINED]


def publish(config: AppConfig, pool: Path, folder: Path, instructions: Mapping[str, Instruction]) -> None:
    """Publish every adapter of `pool` with stripped samples and its contract. `folder`: for their copies."""
    bases, staged = config.served_model.accepted_names, []
    store = LoraStore(config.store_uri, accepts_base=bases, read_contract=read_contract)
    for name, instruction in instructions.items():
        copied = Path(shutil.copytree(pool / name, folder / name))
        rows = read_samples(copied)
        lines = [json.dumps({**row, "input": instruction.strip(row["input"])}) + "\n" for row in rows]
        (copied / "lora_samples.jsonl").write_text("".join(lines), encoding="utf-8")
        staged.append(store.stage(copied, contract=instruction.contract))
    embeddings = embed_groups(live_pool(config, store.snapshot).current.encoder, [item.samples for item in staged])
    store.commit(staged, embeddings, [1.0] * len(staged), "benchmark")


def find_interval(values: Sequence[bool], num_tasks: int) -> Interval:
    """Return the share of the values, which are those of one task after another."""
    return bootstrap(np.asarray(values, float).reshape(1, num_tasks, -1))


def main(pool: Path = POOL, held_out: Path = HELD_OUT, per_task: int = 12) -> None:
    """Measure, print the table and write results/contracts. Both folders are as those of examples/."""
    prompts = {path.stem: read_rows(path) for path in sorted(held_out.glob("*.jsonl"))}
    known = {name: [*rows, *read_samples(pool / name)] for name, rows in prompts.items()}
    instructions = {name: find_instruction([row["input"] for row in rows]) for name, rows in known.items()}
    measured = [name for name, found in instructions.items() if found.contract]
    per_task = min([per_task, *(len(prompts[name]) for name in measured)])  # intervals need as many of each
    tasks = {name: prompts[name][:per_task] for name in measured}
    asked = [(name, row["input"], row["output"]) for name, rows in tasks.items() for row in rows]
    table = Table("prompt", "model", "right, %", "right adapter first, %")
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = AppConfig(store_uri=f"{folder}/pool")
        publish(config, pool, Path(folder), instructions)
        with LoraRetriever(config) as offline:
            for (kind, applies), model in [
                (item, model) for item in ASKED.items() for model in ("the adapter", "auto")
            ]:
                texts = [text if kind == "whole prompt" else instructions[name].strip(text) for name, text, _ in asked]
                named = [{"adapters": [{"name": name}]} if model != "auto" else {} for name, _, _ in asked]
                options = [{**lora, "contract": applies} for lora in named]
                found: list[Generated] = offline.generate(texts, options, max_tokens=MAX_TOKENS, temperature=0)
                right = [bool(score_of(answer.text, row[2])) for row, answer in zip(asked, found, strict=True)]
                firsts = [[used["name"] for used in answer.adapters][:1] for answer in found]
                first = [names == [name] for names, (name, _, _) in zip(firsts, asked, strict=True)]
                shares = [find_interval(values, len(tasks)) for values in (right, first)]
                table.add_row(kind, model, *(share.in_percent() for share in shares))
                runs.append({"prompt": kind, "model": model, "right": shares[0], "first": shares[1], "num": len(asked)})
    with out.capture() as captured:
        out.print(table)
    out.print(captured.get())
    figures = {f"contracts_{run['prompt']}_{run['model']}": run["right"].mean for run in runs}
    write_results("contracts", figures=figures, table=captured.get(), runs=runs)


if __name__ == "__main__":
    typer.run(main)
