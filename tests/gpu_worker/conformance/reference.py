"""The slow, exact answer: the model in float64 with the plan's adapters added to its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gpu_worker.front.text.token_bytes import TokenBytes
from gpu_worker.model.checkpoint import auto_class, read_config
from gpu_worker.vllm.front_model import language_modules, language_part
from lora_store.adapter import AdapterWeights
from lora_store.plan import Plan


@dataclass(frozen=True)
class Step:
    """One greedy token: its id, and the log probabilities (V,) float64 it was chosen from."""

    token: int
    logprobs: Tensor


class Reference:
    """A model whose weights are changed for one plan at a time."""

    def __init__(self, folder: Path) -> None:
        whole = auto_class(read_config(str(folder))).from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        self._model = language_part(whole)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model.eval()
        found, _ = language_modules(whole)
        self._weights = {name: linear.weight for name, linear in found.linears.items()}
        for path, experts in found.experts.items():
            self._weights |= {f"{path}.{name}": weight for name, weight in experts.named_parameters(recurse=False)}

    @torch.inference_mode()
    def greedy(self, prompt: str, plan: Plan, pool: Mapping[str, AdapterWeights], num_new: int) -> list[Step]:
        """Return the greedy answer of the prompt under the plan, recomputing the whole text at each token."""
        with self._under(plan, pool):
            tokens = list(self._tokenizer(prompt).input_ids)
            return [self._next(tokens) for _ in range(num_new)]

    @torch.inference_mode()
    def prompt_logprobs(self, tokens: Sequence[int], plan: Plan, pool: Mapping[str, AdapterWeights]) -> Tensor:
        """Return the log probabilities (T - 1, V) float64 from which each token after the first one is scored."""
        with self._under(plan, pool):
            logits: Tensor = self._model(input_ids=torch.tensor([list(tokens)])).logits[0, :-1]
        return logits.log_softmax(-1)

    def tokens_of(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt).input_ids)

    @contextmanager
    def _under(self, plan: Plan, pool: Mapping[str, AdapterWeights]) -> Iterator[None]:
        """Add the plan's adapters to the weights within the block."""
        changes = deltas(plan, pool)
        for name, change in changes.items():
            self._weights[name] += change
        try:
            yield
        finally:
            for name, change in changes.items():
                self._weights[name] -= change

    def token_bytes(self, token: int) -> bytes:
        return TokenBytes(self._tokenizer.backend_tokenizer)(token)

    def _next(self, tokens: list[int]) -> Step:
        logits = self._model(input_ids=torch.tensor([tokens])).logits[0, -1]
        chosen = int(logits.argmax())
        tokens.append(chosen)
        return Step(chosen, logits.log_softmax(-1))


def deltas(plan: Plan, pool: Mapping[str, AdapterWeights]) -> dict[str, Tensor]:
    """Return the change (out, in) of each module's weight under the plan, in float64; of experts (experts, out, in).

    selection, mixture: sum_s m_s B_s A_s.  fusion: (sum_s m_s B_s) (sum_s m_s A_s), ranks padded with zeros.
    B_s includes the adapter's scaling.
    """
    changes: dict[str, Tensor] = {}
    names = {name for adapter in plan.adapters for name in pool[adapter.weights_digest].modules}
    for name in names:
        parts = []
        for adapter in plan.adapters:
            module = pool[adapter.weights_digest].modules.get(name)
            if module is not None:
                parts.append((adapter.weight, module.lora_a.double(), module.lora_b.double() * module.scaling))
        if plan.strategy == "fusion":
            rank = max(a.shape[-2] for _, a, _ in parts)
            a = sum(weight * torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[-2])) for weight, a, _ in parts)
            b = sum(weight * torch.nn.functional.pad(b, (0, rank - b.shape[-1])) for weight, _, b in parts)
            assert isinstance(a, Tensor) and isinstance(b, Tensor)
            changes[name] = b @ a
        else:
            total = sum(weight * (b @ a) for weight, a, b in parts)
            assert isinstance(total, Tensor)
            changes[name] = total
    return changes
