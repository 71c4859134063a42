"""What goes into the engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from gpu_worker.errors import SamplingInvalid
from gpu_worker.prompts import Message
from lora_store.adapter import LOCAL_TENANT
from lora_store.plan import BASE_PLAN, Plan

FinishReason = Literal["stop", "length"]
DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How new tokens are chosen. Raises: SamplingInvalid, naming the parameter."""

    max_tokens: int | None = None  # None: DEFAULT_MAX_TOKENS, or what the context has room for
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all ids
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        self._require(limit >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        self._require(
            0 <= self.min_tokens <= limit,
            f"min_tokens must be between 0 and max_tokens ({limit}), got {self.min_tokens}",
        )
        self._require(0 <= self.temperature <= 100, f"temperature must be between 0 and 100, got {self.temperature}")
        self._require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")
        self._require(self.top_k >= 0, f"top_k must be 0 (all) or more, got {self.top_k}")
        self._require(
            self.seed is None or 0 <= self.seed < 2**63, f"seed must be between 0 and 2**63 - 1, got {self.seed}"
        )
        self._require(len(self.stop) <= MAX_STOPS, f"at most {MAX_STOPS} stop strings, got {len(self.stop)}")
        for stop in self.stop:
            self._require(
                0 < len(stop) <= MAX_STOP_CHARS, f"a stop string has 1 to {MAX_STOP_CHARS} characters, got {len(stop)}"
            )

    @staticmethod
    def _require(holds: bool, message: str) -> None:
        if not holds:
            raise SamplingInvalid(message)


@dataclass(frozen=True, slots=True)
class Job:
    """One request as a worker gets it: messages to render, or a raw prompt, and the plan that answers it."""

    request_id: str
    prompt: str | tuple[Message, ...]
    plan: Plan = BASE_PLAN
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template: str = "alpaca"  # how messages are rendered; a raw prompt is used as it is
    tenant: str = LOCAL_TENANT  # tenants take turns in the engine's queue
    deadline: float | None = None  # seconds since the epoch: a worker may run on another machine


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one request. The last one carries the finish reason."""

    text: str
    num_prompt_tokens: int
    num_new_tokens: int  # so far, this delta included
    finish_reason: FinishReason | None = None
    first_logits: torch.Tensor | None = None  # (V,) float32 after the prompt, where a probe asked for it


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: FinishReason
