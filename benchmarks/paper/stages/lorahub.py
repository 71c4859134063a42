"""Search LoRAHub's weights on the pool and answer with them: `python -m benchmarks.paper.stages.lorahub`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Method
from benchmarks.paper.answering.stores import fetch_from
from benchmarks.paper.common.resumable import key_of
from benchmarks.paper.common.tasks import NUM_TEST
from benchmarks.paper.stages.answers import Claim
from benchmarks.paper.stages.stage import Loaded, Stage, answer_over_pool, run
from benchmarks.paper.training.lorahub import FusedModel, search_weights
from benchmarks.paper.training.lower_layers import lower_layers
from benchmarks.paper.training.packing import Packed
from benchmarks.training.adapter_files import load_base
from benchmarks.training.bigbench_tasks import TaskSpec, task_rng
from benchmarks.training.lora_training import NO_LABEL, AnswerLoss, Example, Recipe, tokenize
from gpu_worker.model.base_model import model_source
from lora_store import AdapterRef, AdapterWeights, ModuleWeights, Plan, PlannedAdapter
from retriever_svc import Retriever

NAME = "lorahub"
NUM_ADAPTERS = 20
NUM_ATTEMPTS = 40
MAX_ROW_TOKENS = 800
"""Tokens of the examples that are computed together."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One adapter of the pool."""

    ref: AdapterRef
    weights: AdapterWeights


def draw_tasks(specs: Sequence[TaskSpec]) -> list[str]:
    """Draw the tasks whose adapters LoRAHub sums."""
    return task_rng(NAME).sample(sorted(spec.name for spec in specs), min(NUM_ADAPTERS, len(specs)))


@contextmanager
def hub_loss(base: Any, experts: Sequence[Expert], examples: Sequence[Example]) -> Iterator[Callable[[Tensor], float]]:
    """Yield a function from weights (P,) to the mean loss of all answer tokens.

    The layers below the experts are computed once. All examples have the same weights, so they share rows.
    """
    loss_of = AnswerLoss(base.model.embed_tokens.weight, examples, Recipe())
    model = FusedModel(base, [expert.weights for expert in experts])
    first = min(int(name.split(".")[2]) for name in experts[0].weights.modules)
    packed = Packed(examples, base.config)
    chunks = split_rows(examples, packed, MAX_ROW_TOKENS)
    with lower_layers(packed, base.model, first, [one for chunk in chunks for one in chunk]) as layout:
        batches = [layout.batch(chunk) for chunk in chunks]
        counts = torch.tensor([int((batch.labels != NO_LABEL).sum()) for batch in batches])

        @torch.no_grad()
        def loss(weights: Tensor) -> float:
            found = torch.stack([model.loss(batch, weights, loss_of) for batch in batches])
            return float((found * counts).sum() / counts.sum())

        yield loss


def split_rows(examples: Sequence[Example], packed: Packed, max_tokens: int) -> list[list[Example]]:
    """Return the examples, shortest first, in rows of at most `max_tokens` tokens, or of one example."""
    chunks: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: len(example.ids)):
        if chunks[-1] and packed.num_tokens([*chunks[-1], example]) > max_tokens:
            chunks.append([])
        chunks[-1].append(example)
    return chunks


def find_weights(
    base: Any, experts: Sequence[Expert], examples: Sequence[Example], num_attempts: int, folder: Path, out: Console
) -> Tensor:
    """Return the weights (P,), from `folder` if the same search ended before."""
    digests = [expert.weights.weights_digest for expert in experts]
    path = folder / f"{NAME}-{key_of(digests, num_attempts, 'COBYLA from zeros')}.safetensors"
    if not path.exists():
        with hub_loss(base, experts, examples) as loss_of:

            def logged(weights: Tensor) -> float:
                found = loss_of(weights)
                out.print(f"{NAME}: loss {found:.3f}")
                return found

            weights, _ = search_weights(logged, len(experts), num_attempts)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weights": weights}, path)
    return load_file(path)["weights"]


def merge(experts: Sequence[Expert], weights: Tensor) -> AdapterWeights:
    """Return (Σ w_i s_i B_i)(Σ w_i A_i) as one adapter of scaling 1, because a plan cannot hold so many adapters."""
    shares = weights.tolist()
    modules = {}
    for name in experts[0].weights.modules:
        parts = [expert.weights.modules[name] for expert in experts]
        lora_a = torch.stack([w * part.lora_a.float() for w, part in zip(shares, parts, strict=True)]).sum(0)
        lora_b = torch.stack([w * part.scaling * part.lora_b.float() for w, part in zip(shares, parts, strict=True)])
        modules[name] = ModuleWeights(lora_a, lora_b.sum(0), 1.0)
    named = [(expert.ref.digest, round(weight, 6)) for expert, weight in zip(experts, shares, strict=True)]
    return AdapterWeights(hashlib.sha256(repr(named).encode()).hexdigest(), modules)


class One:
    """Uses one merged adapter for every question."""

    def __init__(self, weights: AdapterWeights, name: str = NAME) -> None:
        ref = AdapterRef("local", name, weights.weights_digest)
        self._plan = Plan("selection", (PlannedAdapter(ref, weights.weights_digest, 1.0),))

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        return [self._plan] * len(questions)


def make_arms(loaded: Loaded, num_attempts: int = NUM_ATTEMPTS) -> Mapping[str, Method]:
    """Return LoRAHub over the pool, and the paper's mixture beside it."""
    study, snapshot = loaded.bench.study, loaded.store.snapshot()
    records = [snapshot.resolve("local", name) for name in draw_tasks(list(study.specs.values()))]
    experts = [Expert(record.ref, fetch_from(loaded.store, record.weights_digest)) for record in records]
    base = load_base(Path(model_source(loaded.bench.asker.engine.config)))
    items = [item for name in study.specs for item in study.parts[name].samples]
    examples = tokenize(items, study.tokenizer)
    folder = study.workspace.root / "routers"
    merged = merge(experts, find_weights(base, experts, examples, num_attempts, folder, loaded.bench.out))
    loaded.weights.made[merged.weights_digest] = merged
    return {NAME: One(merged), "mixture_ood": Routed("mixture", masks_own=True)}


STAGE = Stage(
    name=NAME,
    title="LoRAHub",
    note=f"One set of weights for {NUM_ADAPTERS} adapters, from zeros, {NUM_ATTEMPTS} attempts on all samples.",
    rows=answer_over_pool(make_arms),
    claims=(Claim("Out of distribution the mixture is better than LoRAHub.", "mixture_ood", NAME),),
    per_task=NUM_TEST,
)

if __name__ == "__main__":
    run(STAGE)
