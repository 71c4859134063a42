"""Shared parts of every run of answers, loaded once: the tasks' parts, the engine, the saved answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from benchmarks.paper.answering.answers import Asker, Question, loading
from benchmarks.paper.answering.stores import fetch_from, open_store, publish
from benchmarks.paper.common.tasks import Parts, load_parts
from benchmarks.paper.common.workspace import Workspace
from benchmarks.training.bigbench_tasks import TaskSpec, task_rng
from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.model.base_model import model_source
from gpu_worker.native.loop import Engine
from lora_store import AdapterNotFound, AdapterWeights, LoraStore

RANK = 6
_WAIT_S = 1e6  # no client waits for these answers


def worker_config(num_adapters: int, **changes: Any) -> NativeWorkerConfig:
    """Return the settings of a worker whose bank holds all adapters of the pool."""
    settings: dict[str, Any] = {"bank_rank_rows": RANK * num_adapters, "max_model_len": 512, "max_wait_s": _WAIT_S}
    return NativeWorkerConfig(**settings | changes)


@dataclass(frozen=True, slots=True)
class Study:
    """The tasks of a study. `specs`: the tasks to ask, by name."""

    workspace: Workspace
    specs: dict[str, TaskSpec]
    parts: dict[str, Parts]
    tokenizer: Any

    def questions(self, part: str, per_task: int) -> list[Question]:
        """Return the first `per_task` items of every task's part, mixed."""
        longest = {name: self._max_tokens(name) for name in self.specs}
        found = [
            Question(name, part, number, item, longest[name])
            for name in self.specs
            for number, item in enumerate(getattr(self.parts[name], part)[:per_task])
        ]
        task_rng(f"order of {part}").shuffle(found)
        return found

    def _max_tokens(self, name: str) -> int:
        """Return the longest answer of the training part plus the end token, so test items do not set the limit."""
        texts = [item.answers[0] for item in self.parts[name].train]
        return max(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"])) + 1


def load_study(specs: Sequence[TaskSpec], workspace: Workspace, config: NativeWorkerConfig) -> Study:
    tokenizer = AutoTokenizer.from_pretrained(model_source(config))
    return Study(workspace, {spec.name: spec for spec in specs}, load_parts(specs, workspace, tokenizer), tokenizer)


class Weights:
    """Supplies the engine's weights: created ones by digest, all others from the store of candidates."""

    def __init__(self, store: LoraStore) -> None:
        self._store, self.made = store, dict[str, AdapterWeights]()

    def __call__(self, digest: str) -> AdapterWeights:
        return self.made[digest] if digest in self.made else fetch_from(self._store, digest)


def load_asker(
    workspace: Workspace, config: NativeWorkerConfig, names: Sequence[str]
) -> tuple[Asker, LoraStore, Weights]:
    """Load an engine whose adapters are in the store of candidates. Publish `names` there, without embeddings."""
    store = open_store(workspace.store_uri("candidates"))
    weights = Weights(store)
    executor = load_executor(config.load_threads)
    engine = Engine(config, loading(weights, executor), executor=executor)
    publish_lacking(store, workspace, names, engine.bank)
    return Asker(engine, workspace.root / "answers.jsonl"), store, weights


def publish_lacking(store: LoraStore, workspace: Workspace, names: Sequence[str], bank: LoraBank) -> None:
    """Publish those of `names` that are not live in `store`, without embeddings."""
    lacking = [workspace.adapters / name for name in names if not _is_live(store, name)]
    if lacking:
        publish(store, lacking, None, bank)


def _is_live(store: LoraStore, name: str) -> bool:
    try:
        store.snapshot().resolve("local", name)
    except AdapterNotFound:
        return False
    return True
