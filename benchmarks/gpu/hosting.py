"""An engine in this process, the adapters that it can fetch, and jobs for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_worker.bank.loader import Fetch
from gpu_worker.config import NativeWorkerConfig, VllmWorkerConfig
from gpu_worker.engine import InferenceEngine
from gpu_worker.front.request.request import Completion, Job, SamplingParams
from gpu_worker.native.engine import NativeEngine
from lora_store import BASE_PLAN, AdapterWeights, ModuleWeights, Plan


@dataclass
class Hosted:
    """A running engine. All of it belongs to one event loop.

    Free rows of its bank are NaN, so that an answer shows if one is read.
    """

    config: NativeWorkerConfig | VllmWorkerConfig
    pool: dict[str, AdapterWeights] = field(default_factory=dict)
    _drawn: dict[int, dict[str, ModuleWeights]] = field(default_factory=dict)

    async def start(self) -> None:
        """Start the engine that the settings name. Call it within the event loop."""
        self.engine: InferenceEngine = await _start(self.config, self._fetch)

    def add(self, digest: str, seed: int, *, rank: int, size: float) -> AdapterWeights:
        """Put a random adapter of all modules into the pool. Equal seeds share their tensors."""
        if seed not in self._drawn:
            self._drawn[seed] = self._draw(seed, rank, size)
        self.pool[digest] = AdapterWeights(digest, self._drawn[seed])
        return self.pool[digest]

    async def answers(self, jobs: Sequence[Job]) -> list[Completion]:
        """Answer all jobs together. Raises: the first job's error."""
        found = []
        for outcome in await self.engine.generate(jobs):
            if isinstance(outcome, Exception):
                raise outcome
            found.append(outcome)
        return found

    def _fetch(self, digest: str) -> Future[AdapterWeights]:
        fetched: Future[AdapterWeights] = Future()
        fetched.set_result(self.pool[digest])
        return fetched

    def _draw(self, seed: int, rank: int, size: float) -> dict[str, ModuleWeights]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * size).bfloat16()

        shapes = self.engine.module_shapes
        return {name: ModuleWeights(draw(rank, i), draw(o, rank), 1.0) for name, (o, i) in shapes.items()}


def job(prompt: str, plan: Plan = BASE_PLAN, *, num_new: int = 8, logprobs: int | None = None) -> Job:
    """Return a greedy job of exactly `num_new` tokens."""
    sampling = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True, logprobs=logprobs)
    return Job("gpu", prompt, plan, sampling)


async def _start(config: NativeWorkerConfig | VllmWorkerConfig, fetch: Fetch) -> InferenceEngine:
    if isinstance(config, NativeWorkerConfig):
        return NativeEngine.start(config, fetch, stream_interval_ms=0, free_fill=math.nan)
    from gpu_worker.vllm.engine import VllmEngine

    return await VllmEngine.start(
        config, fetch, stream_interval_ms=0, free_fill=math.nan, is_compiled=config.device == "cuda"
    )
