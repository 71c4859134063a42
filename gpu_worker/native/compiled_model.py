"""Compute a causal model's decoder and head without transformers' code around them, where it adds nothing.

That code makes and unpacks two results, which takes a step of one row 3 % of its time.

Dims: N tokens, K of them with logits, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.model.packed_attention import unknown_arguments
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.compiled_decoder import PROBE_ERRORS, CompiledDecoder, is_same, replaced

_PROBE_TOKENS, _PROBE_LOGITS = 5, 7


@dataclass(frozen=True, slots=True)
class Logits:
    """The result of a causal model, of which only the logits (1, K, V) are read."""

    logits: Tensor


class CompiledModel:
    """The `forward` of a causal model: its decoder and its head where the kernel computes the decoder, else its own."""

    def __init__(self, own: nn.Module, decoder: nn.Module, compiled: CompiledDecoder, head: nn.Module) -> None:
        self._own: Callable[..., Any] = own.forward
        self._compiled, self._head = compiled, head
        self._hooks = decoder._forward_hooks, decoder._forward_pre_hooks

    def __call__(self, *arguments: Any, **others: Any) -> Any:
        hidden = None
        kept = others.get("logits_to_keep", 0)
        if not arguments and not any(self._hooks) and (isinstance(kept, Tensor) or kept == 0):
            hidden = self._compiled.hidden({name: value for name, value in others.items() if name != "logits_to_keep"})
        if hidden is None:
            return self._own(*arguments, **others)
        return Logits(self._head(hidden[:, kept] if isinstance(kept, Tensor) else hidden))


@torch.inference_mode()
def compile_model(model: PreTrainedModel) -> bool:
    """Call the model's compiled decoder and its head directly, in place, if the model adds nothing to them.

    That is seen in a call with random output of both. Return whether it is so.
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    compiled = decoder.forward
    if not isinstance(compiled, CompiledDecoder) or not isinstance(head, nn.Module):
        return False
    if not _only_calls(model, decoder, compiled, head):
        return False
    model.forward = CompiledModel(model, decoder, compiled, head)
    return True


def _only_calls(model: nn.Module, decoder: nn.Module, compiled: CompiledDecoder, head: nn.Module) -> bool:
    """Return whether the model passes what it is given to the decoder, and the kept states to the head."""
    ids, positions = torch.arange(_PROBE_TOKENS)[None], torch.arange(3, 3 + _PROBE_TOKENS)[None]
    step, generator = StepContext(), torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, compiled.width, generator=generator).bfloat16()
    called, read = list[dict[str, Any]](), list[Tensor]()

    def compute_decoder(**others: Any) -> Any:
        called.append(others)
        return compiled.make_output(last_hidden_state=hidden)

    def compute_head(x: Tensor) -> Tensor:
        read.append(x)
        return logits

    for kept in (0, torch.tensor([3, 1])):
        expected = hidden[:, kept] if isinstance(kept, Tensor) else hidden
        num_logits = expected.shape[1], _PROBE_LOGITS
        logits = torch.randn(1, *num_logits, generator=generator).bfloat16() * 100  # a model that caps them is seen
        called.clear()
        read.clear()
        with replaced([(decoder, compute_decoder), (head, compute_head)]):
            try:
                output = model(input_ids=ids, position_ids=positions, logits_to_keep=kept, use_cache=False, step=step)
            except PROBE_ERRORS:
                return False
        if [unknown_arguments(given) for given in called] != [["input_ids", "step"]] or len(read) != 1:
            return False
        given, found = called[0], getattr(output, "logits", None)
        pairs = (given["input_ids"], ids), (given.get("position_ids"), positions), (read[0], expected), (found, logits)
        if given["step"] is not step or not all(is_same(x, y) for x, y in pairs):
            return False
    return True
