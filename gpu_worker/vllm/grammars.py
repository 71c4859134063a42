"""Grammars in the process of vLLM's scheduler, which computes the masks: with the vocabulary of the front end.

vLLM's own vocabulary has one id that ends an answer, and no text for special tokens that begin a call.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.v1 import structured_output
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.structured_output.backend_guidance import GuidanceBackend

from gpu_worker.front.preprocess import make_model_vocabulary
from gpu_worker.vllm.settings import PluginSettings


def make_scheduler(vllm_config: VllmConfig, **arguments: Any) -> Scheduler:
    """Return vLLM's scheduler, unchanged: `scheduler_cls` names what vLLM calls in that process at its start."""
    structured_output.GuidanceBackend = PlanGuidance  # made with the first grammar
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return kind(vllm_config=vllm_config, **arguments)


class PlanGuidance(GuidanceBackend):  # type: ignore[misc]
    """vLLM's use of the grammar library."""

    def _build_ll_tokenizer(self, tokenizer: Any, vocab_size: int) -> Any:
        settings = PluginSettings.of(self.vllm_config.additional_config)
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return make_model_vocabulary(backend, vocab_size, settings.end_ids, settings.special_ids)
