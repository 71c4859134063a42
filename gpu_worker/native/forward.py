"""The forward pass of one packed step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpu_worker.bank.residency import Residency
from gpu_worker.front.row import Row
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.experts import expert_mapping
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.mapping import Composer
from gpu_worker.model.step_context import Composition, Masks, StepContext
from gpu_worker.model.transfer import to_device
from gpu_worker.native.attention.kv_cache import KvCache
from gpu_worker.native.scheduler import Scheduled
from lora_store.plan import Plan

logger = logging.getLogger(__name__)


class ForwardPass:
    """The forward pass of the base model with each row's adapters over the tokens of one step.

    Keys and values are written to the cache at the segments' positions. Nothing else changes, so the same segments can
    be computed again, whole or in part, after a pass that raised.
    """

    def __init__(
        self,
        base: BaseModel,
        residency: Residency,
        kv_cache: KvCache,
        context: StepContext,
        kernel: LoraKernel | None,
        device: torch.device,
    ) -> None:
        # describes the adapters of a step to its layers; a benchmark replaces it for some steps
        self.compose: Callable[[Sequence[Plan], Sequence[int]], Composition | None] = Composer(
            residency, base.dtype, kernel, device
        )
        self._base, self._kv_cache, self._context, self._device = base, kv_cache, context, device
        self._residency = residency

    def __call__(self, scheduled: Sequence[Scheduled], masks: Masks = tuple) -> Tensor:
        """Return logits (K, V), float32 or the model's dtype.

        `masks`: those of the first rows. An id that its row's mask excludes may have -inf in the place of its logit.

        First those of the rows whose last token was computed, with those of its guesses, then those of the positions
        that score prompt tokens.
        A step of incomplete prompt chunks may have none: `logits_to_keep` is empty and the head computes nothing.
        """
        tokens = [token for row, s in scheduled for token in row.step_tokens(s.context_len, s.total_len)]
        last = [
            s.start + len(row.tokens) - 1 + ahead - s.context_len
            for row, s in scheduled
            for ahead in row.choices(s.total_len)
        ]
        kept = last + [
            s.start + position - s.context_len
            for row, s in scheduled
            for position in row.positions_to_score(s.context_len, s.total_len)
        ]
        plans, segments = [row.plan for row, _ in scheduled], [segment for _, segment in scheduled]
        return self.logits(plans, segments, tokens, kept, masks)

    def logits(
        self,
        plans: Sequence[Plan],
        segments: Sequence[Segment],
        tokens: Sequence[int],
        kept: Sequence[int],
        masks: Masks = tuple,
    ) -> Tensor:
        """Compute one step and return the logits (K, V), float32 or the model's dtype. K may be 0.

        Dims: B segments, which cover the step in order, each with its plan; N token ids; K `kept` positions of them.
        Every adapter of the plans must be active, and the segments' rows must have KV for their tokens.
        """
        num_tokens = [segment.num_tokens for segment in segments]
        lora = self.compose(plans, num_tokens)
        attention = self._kv_cache.attention(segments)
        experts = expert_mapping(plans, num_tokens, self._residency, self._device)
        self._context.fill(lora, attention, masks, experts=experts)
        logits_to_keep: Tensor | int = 0  # all, without a copy of the hidden states
        if list(kept) != list(range(len(tokens))):
            logits_to_keep = to_device(torch.tensor(kept, dtype=torch.long), self._device)
        try:
            output = self._base.model(
                input_ids=to_device(torch.tensor(tokens), self._device)[None],
                position_ids=attention.token_positions[None],
                logits_to_keep=logits_to_keep,
                use_cache=False,
                step=self._context,
            )
        finally:
            self._context.masks = tuple  # they refer to the step's rows, which may end with it
        logits: Tensor = output.logits[0]
        return logits

    def can_compute(self, row: Row) -> bool:
        """Compute the first token of a row that belongs to no request; return whether it succeeded.

        Needs a free row and a free page of the cache. Raises: errors of freeing them on a lost device.
        """
        probe_row = self._kv_cache.allocate(1, 1)
        try:
            logits = self([(row, Segment(probe_row, 0, 1, 0))])
            return bool(logits.isfinite().all())
        except Exception:
            logger.exception("the device cannot compute a single token of the base model")
            return False
        finally:
            self._kv_cache.free(probe_row)
