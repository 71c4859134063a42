"""The interface between a Worker and its engine.

Two engines implement it: `gpu_worker.native.engine` and `gpu_worker.vllm`. The tests in `tests/gpu_worker/conformance`
run over both and define its meaning.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Completion, Delta, Job, Prompt, TokenIds, Tokenized


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The health of an engine. An engine that is not alive never recovers; its process must be replaced."""

    is_alive: bool
    busy_s: float = 0.0  # duration of the step or command in progress; a large value means that it hangs
    failure: str | None = None  # the error that ended the engine


class InferenceEngine(Protocol):
    """One base model that answers many jobs in one batch, each with its own plan of adapters.

    Weights come from the `fetch` that the engine was started with, by digest, when a job needs them. A job never sees
    weights change: it keeps its adapters until it ends. All methods belong to the event loop in which the engine was
    started. After the engine has ended they raise EngineStopped.
    """

    @property
    def module_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every module an adapter may target, by the base model's module path."""
        ...

    @property
    def num_missing_kernels(self) -> int:
        """Return how many compiled kernels are missing and replaced by slower code."""
        ...

    def stream(self, job: Job, heartbeat_interval_s: float | None = None) -> AsyncGenerator[Delta | None]:
        """Yield None once the job has arrived, then new text: the first at once, later texts at intervals.

        After `heartbeat_interval_s` without text yield None. Leaving the iterator early cancels the job.
        Raises: the error of this job, a GpuWorkerError.
        """
        ...

    async def generate(self, jobs: Sequence[Job]) -> list[Completion | Exception]:
        """Return each job's whole answer or error, in order. The jobs enter the queue together.

        Cancelling the call cancels all unfinished jobs.
        """
        ...

    async def tokenize(
        self,
        prompt: Prompt,
        template: str,
        *,
        tenant: str,
        add_special_tokens: bool | None = None,
        with_texts: bool = False,
    ) -> Tokenized:
        """Return the tokens of a prompt, which may exceed the context; `with_texts`: also the text of each.

        Tenants take turns, and no number of calls delays a job. `add_special_tokens`: None for what a job with this
        prompt does. Raises: PromptInvalid, PromptTooLong, EngineFull.
        """
        ...

    async def detokenize(self, prompts: Sequence[TokenIds], *, tenant: str, skip_special_tokens: bool) -> list[str]:
        """Return the text of each prompt, in the same turns.

        Raises: PromptInvalid for an id outside the vocabulary, EngineFull.
        """
        ...

    async def forget(self, weights_digests: Collection[str]) -> bool:
        """Drop these weights from the device and host memory. Return whether they are all gone.

        Weights in use are dropped when the last job that uses them ends.
        """
        ...

    async def status(self) -> EngineStatus: ...

    async def expected(self) -> frozenset[str]:
        """Return the weights digests on the device and those that waiting jobs will bring in."""
        ...

    async def probe(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        """Return how far each adapter moves the base model's output on a fixed prompt, relative to its largest value.

        A shift within rounding is 0.0; an adapter that cannot be probed gets its error.
        """
        ...

    def health(self) -> EngineHealth: ...

    def kill(self) -> None:
        """Kill the processes that the engine has started, if any, because this one is about to end itself."""
        ...

    def stop(self) -> None:
        """End every job with EngineStopped and release the device. Blocks until that is done."""
        ...
