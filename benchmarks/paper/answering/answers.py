"""Ask the server's engine offline: greedy answers to questions under plans, each computed once and kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from benchmarks.training.bigbench_tasks import Item
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.front.row import Row
from gpu_worker.model.packed_linear import KernelLinear
from gpu_worker.model.quantization import QuantizedLinear
from gpu_worker.native.loop import Engine
from lora_store import AdapterWeights, Plan

_CHUNK = 192  # rows saved together; an interruption loses at most these
_DESCRIBED_ROWS = 32  # the first rows of each integer layer, which name how it is rounded
Fetch = Callable[[str], AdapterWeights]
"""Return the weights of a digest."""


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a task. `number`: its position in its part; `max_tokens`: the longest answer plus the end token."""

    task: str
    part: str
    number: int
    item: Item
    max_tokens: int


Asked = tuple[Question, Plan]


class Asker:
    """Answers (question, plan) pairs through an Engine. Equal pairs are computed once, also in later runs."""

    def __init__(self, engine: Engine, kept: Path) -> None:
        """Open `kept`, the file of all answers so far, with one JSON object per line. Chunks are appended to it."""
        self.engine = engine
        self._kept, self._weights = kept, describe_weights(engine)
        self._known = {row["key"]: row["text"] for row in _lines(kept)}

    def answers(self, asked: Sequence[Asked], out: Console, name: str) -> list[str]:
        """Return the text of each answer, in order. Log to `out`: the number of new ones, the time, the progress."""
        keys = [self._key(question, plan) for question, plan in asked]
        missing = {key: pair for key, pair in zip(keys, asked, strict=True) if key not in self._known}
        new, began = list(missing.items()), time.monotonic()
        for start in range(0, len(new), _CHUNK):
            self._compute(dict(new[start : start + _CHUNK]))
            done, spent = min(start + _CHUNK, len(new)), time.monotonic() - began
            rest = spent / done * (len(new) - done)
            out.print(f"{name}: {done} of {len(new)} new answers, {spent:.0f} s, about {rest:.0f} s left", markup=False)
        return [self._known[key] for key in keys]

    def num_new(self, asked: Sequence[Asked]) -> int:
        """Return how many different pairs are not known yet."""
        return len({self._key(*pair) for pair in asked} - self._known.keys())

    def _key(self, question: Question, plan: Plan) -> str:
        return answer_key(question, plan, self._weights)

    def _compute(self, pairs: Mapping[str, Asked]) -> None:
        reported: dict[str, list[Delta]] = {key: [] for key in pairs}
        failures: list[Exception] = []
        for key, (question, plan) in pairs.items():
            self.engine.submit(self._row(key, question, plan, reported[key], failures))
        self.engine.run_until_idle()
        if failures:
            raise failures[0]  # before any answer of the chunk is saved
        rows = [{"key": key, "text": "".join(delta.text for delta in deltas)} for key, deltas in reported.items()]
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._kept.with_suffix(".lock")), self._kept.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._known |= {row["key"]: row["text"] for row in rows}

    def _row(self, key: str, question: Question, plan: Plan, reported: list[Delta], failures: list[Exception]) -> Row:
        def take(event: Delta | Exception) -> None:
            if isinstance(event, Exception):
                failures.append(event)
            else:
                reported.append(event)

        sampling = SamplingParams(max_tokens=question.max_tokens, temperature=0)
        job = Job(key, (Message("user", question.item.input),), replace(plan, template=None), sampling)
        return self.engine.prepare(job, take)


def describe_weights(engine: Engine) -> str:
    """Return the base model's dtype. If its layers are rounded as they are loaded, add a digest of their integers."""
    dtype = str(engine.base.dtype)
    if engine.config.quantization == "none":
        return dtype
    digest = hashlib.sha256()
    for layer in engine.base.model.modules():
        if isinstance(layer, KernelLinear | QuantizedLinear):
            rows = layer.rows(torch.arange(min(_DESCRIBED_ROWS, layer.out_features)))
            digest.update(rows.float().numpy().tobytes())
    return f"{dtype} {digest.hexdigest()}"


def answer_key(question: Question, plan: Plan, weights: str) -> str:
    """Return the name of an answer: equal questions under equal compositions have equal answers.

    `weights`: as `describe_weights` returns them.
    """
    parts = [[adapter.weights_digest, round(adapter.weight, 6)] for adapter in plan.adapters]
    strategy = "selection" if [weight for _, weight in parts] == [1.0] else plan.strategy
    what = [strategy, parts, question.item.input, question.max_tokens, weights]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Return the complete lines of `path`; the last one may be cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.split("\n")[:-1]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def loading(fetch: Fetch, executor: ThreadPoolExecutor) -> Callable[[str], Future[AdapterWeights]]:
    """Adapt `fetch` to the engine's call, without waiting."""
    return lambda digest: executor.submit(fetch, digest)
