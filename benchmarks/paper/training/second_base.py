"""A second base model, derived from the first: drop its least influential layers, then distil the rest.

The influence of a layer is 1 − mean cosine of its input and output (ShortGPT, arXiv 2403.03853, equation 1). The
distillation trains all remaining layers and the embeddings of the task's tokens on unlabelled prompts: it minimises
the Kullback-Leibler divergence from the first model's next-token distribution to the second's, at every token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.training.packing import Packed
from benchmarks.training.adapter_files import load_base
from benchmarks.training.lora_training import NO_LABEL, Batch, Example, Recipe, batches, lr_share
from gpu_worker.front.request.prompts import alpaca_prompt

RECORD = "second_base.json"
_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_JUDGED = 8  # batches of the influences, and of the divergence before and after

_TRAINING = Recipe(num_steps=160, batch_tokens=640, learning_rate=3e-4, warmup_share=0.05)


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """Settings of the second base model. `training`: its steps; fields of adapters do not count."""

    num_layers: int = 12
    training: Recipe = _TRAINING


class Distilled:
    """The second model in training. Dims: T tokens in one row, H hidden, V ids of the trained part.

    Only the embeddings of V ids are trained: the most common ones, and those of the prompts. Others stay the first's.
    """

    def __init__(self, source: Path, kept: Sequence[int], used: Tensor, vocabulary_len: int) -> None:
        """Load the first model from `source` and keep the layers `kept`. `used`: ids of the prompts."""
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.model.config.num_hidden_layers = len(kept)
        self.model.config.layer_types = [self.model.config.layer_types[layer] for layer in kept]
        decoder = self.model.model
        decoder.layers = nn.ModuleList([decoder.layers[layer] for layer in kept])
        self._embedding = decoder.embed_tokens
        whole = self._embedding.weight.requires_grad_(False)
        self._ids = torch.cat([torch.arange(min(vocabulary_len, len(whole))), used]).unique()
        self._place = torch.zeros(len(whole), dtype=torch.long)
        self._place[self._ids] = torch.arange(len(self._ids))
        self.rows = nn.Parameter(whole[self._ids].clone())  # (V, H)

    def parameters(self) -> list[nn.Parameter]:
        return [self.rows, *[p for p in self.model.parameters() if p.requires_grad]]

    def logits(self, batch: Batch) -> Tensor:
        """Return (T, V)."""
        embedded = F.embedding(self._place[batch.ids], self.rows) * self._embedding.embed_scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = replace(batch, hidden=embedded).read_by(self.model.model)[0]
            return (states @ self.rows.T).float()

    def divergence(self, first: nn.Module, batch: Batch) -> Tensor:
        """Return the mean over tokens of KL(p_first || p_second), in nats. `first`: the first base's decoder."""
        with torch.no_grad():
            states = batch.read_by(first)[0]
            wanted = states.bfloat16() @ first.get_submodule("embed_tokens").weight[self._ids].bfloat16().T
        second = self.logits(batch).log_softmax(dim=-1)
        return F.kl_div(second, wanted.float().log_softmax(dim=-1), log_target=True, reduction="batchmean")

    def save(self, folder: Path) -> None:
        """Write the model in bfloat16, with the trained embeddings."""
        with torch.no_grad():
            self._embedding.weight[self._ids] = self.rows
        self.model.bfloat16().save_pretrained(folder)


def prompts_of(texts: Sequence[str], tokenizer: Any) -> list[Example]:
    """Return the texts as prompts without answers."""
    found = tokenizer([alpaca_prompt(text) for text in texts])["input_ids"]
    return [Example(torch.tensor(ids), torch.full((len(ids),), NO_LABEL)) for ids in found]


@torch.no_grad()
def influences(decoder: nn.Module, judged: Sequence[Batch]) -> list[float]:
    """Return 1 − mean cosine of the input and the output of each layer, over all tokens of the batches."""
    layers = list(decoder.get_submodule("layers").children())
    found: list[list[Tensor]] = [[] for _ in layers]
    hooks = [layer.register_forward_hook(_measure(own)) for layer, own in zip(layers, found, strict=True)]
    for batch in judged:
        batch.read_by(decoder)
    for hook in hooks:
        hook.remove()
    return [1 - float(torch.cat(own).mean()) for own in found]


def _measure(own: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def measure(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own.append(F.cosine_similarity(inputs[0].float(), output.float(), dim=-1).flatten())

    return measure


def kept_layers(found: Sequence[float], number: int) -> list[int]:
    """Return the `number` most influential layers, in their order."""
    return sorted(sorted(range(len(found)), key=lambda layer: found[layer], reverse=True)[:number])


def make_second_base(
    source: Path,
    folder: Path,
    texts: Sequence[str],
    held_out: Sequence[str],
    recipe: BaseRecipe,
    on_step: Callable[[int, float], None],
) -> None:
    """Write the second base model into `folder`, complete or not at all. An existing one is kept.

    `texts`: for the training; `held_out`: for the divergence before and after it, which the record file has.
    """
    if folder.exists():
        return
    first, tokenizer = load_base(source), AutoTokenizer.from_pretrained(source)
    examples, others = prompts_of(texts, tokenizer), prompts_of(held_out, tokenizer)
    judged = list(islice(_batches(others, recipe.training, first.config), _JUDGED))
    found = influences(first.model, judged)
    kept = kept_layers(found, recipe.num_layers)
    used = torch.cat([example.ids for example in (*examples, *others)])
    torch.manual_seed(recipe.training.seed)
    second = Distilled(source, kept, used, recipe.training.vocabulary_len)
    before = _mean_divergence(second, first.model, judged)
    _train(second, first.model, _batches(examples, recipe.training, first.config), recipe.training, on_step)
    after = _mean_divergence(second, first.model, judged)
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    second.save(scratch)
    for path in (source / name for name in _FILES):
        if path.exists():
            shutil.copy(path, scratch / path.name)
    record = {"kept": kept, "influences": found, "divergence_before": before, "divergence_after": after}
    (scratch / RECORD).write_text(json.dumps(record), encoding="utf-8")
    scratch.rename(folder)


def _batches(examples: Sequence[Example], recipe: Recipe, config: Any) -> Iterator[Batch]:
    """Yield packed batches without end, in a fixed order."""
    packed = Packed(examples, config)
    return (packed.batch(chosen) for chosen in batches(examples, recipe, packed))


@torch.no_grad()
def _mean_divergence(second: Distilled, first: nn.Module, judged: Sequence[Batch]) -> float:
    return sum(float(second.divergence(first, batch)) for batch in judged) / len(judged)


def _train(
    second: Distilled,
    first: nn.Module,
    upcoming: Iterator[Batch],
    recipe: Recipe,
    on_step: Callable[[int, float], None],
) -> None:
    learning = second.parameters()
    optimizer = torch.optim.AdamW(learning, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, recipe))
    for step, batch in enumerate(islice(upcoming, recipe.num_steps), start=1):
        loss = second.divergence(first, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
