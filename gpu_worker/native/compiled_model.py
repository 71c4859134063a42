"""Compute a causal model's decoder and head without transformers' code around them, where it adds nothing.

That code makes and unpacks two results, which takes 2 % of the time of a step of one row of 4 bits.

Dims: N tokens, K of them with logits, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.model.step_context import StepContext
from gpu_worker.native.compiled_decoder import PROBE_ERRORS, CompiledDecoder, is_same, replaced

_PROBE_TOKENS = 5
_GIVEN = {"input_ids", "position_ids", "use_cache", "step"}  # the arguments of a decoder


@dataclass(frozen=True, slots=True)
class Logits:
    """The result of a causal model, of which only the logits (1, K, V) are read."""

    logits: Tensor


class CompiledModel:
    """The `forward` of a causal model: its decoder and its head where the kernel computes the decoder, else its own."""

    def __init__(self, model: PreTrainedModel, compiled: CompiledDecoder) -> None:
        self._own: Callable[..., Any] = model.forward
        self._find_head, self._compiled = model.get_output_embeddings, compiled  # a head may be replaced later
        self._hooks = model.base_model._forward_hooks, model.base_model._forward_pre_hooks

    def __call__(self, *arguments: Any, **others: Any) -> Any:
        hidden = None
        kept = others.get("logits_to_keep", 0)
        if not arguments and not any(self._hooks) and (isinstance(kept, Tensor) or kept == 0):
            hidden = self._compiled.hidden({name: value for name, value in others.items() if name != "logits_to_keep"})
        if hidden is None:
            return self._own(*arguments, **others)
        return Logits(self._find_head()(hidden[:, kept] if isinstance(kept, Tensor) else hidden))


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
    model.forward = CompiledModel(model, compiled)
    return True


def _only_calls(model: nn.Module, decoder: nn.Module, compiled: CompiledDecoder, head: nn.Module) -> bool:
    """Return whether the model passes what it is given to the decoder, and the kept states to the head."""
    ids = torch.linspace(0, compiled.num_ids - 1, _PROBE_TOKENS).long()[None]
    positions = torch.arange(3, 3 + _PROBE_TOKENS)[None]
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
        size = 1, expected.shape[1], compiled.num_ids
        logits = torch.randn(size, generator=generator).bfloat16() * 100  # so large that a cap changes them
        called.clear()
        read.clear()
        with replaced([(decoder, compute_decoder), (head, compute_head)]):
            try:
                output = model(input_ids=ids, position_ids=positions, logits_to_keep=kept, use_cache=False, step=step)
            except PROBE_ERRORS:
                return False
        names = [{name for name, value in given.items() if value is not None} for given in called]
        if names != [_GIVEN] or len(read) != 1:
            return False
        given, found = called[0], getattr(output, "logits", None)
        pairs = (given["input_ids"], ids), (given.get("position_ids"), positions), (read[0], expected), (found, logits)
        if given["step"] is not step or not all(is_same(x, y) for x, y in pairs):
            return False
    return True
