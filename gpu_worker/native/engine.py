"""The native engine behind the InferenceEngine interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from concurrent.futures import Executor

from gpu_worker.bank.load_threads import use_one_thread
from gpu_worker.bank.loader import Fetch
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import EngineHealth, InferenceEngine
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.offline import generate_all
from gpu_worker.front.probe import Prober
from gpu_worker.front.request.request import Completion, Delta, Job, Prompt, TokenIds, Tokenized
from gpu_worker.front.tokenizing import Tokenizing
from gpu_worker.native.checks.warm_up import warm_up
from gpu_worker.native.engine_thread import EngineThread
from gpu_worker.native.kernels.kernel_loading import num_missing_kernels
from gpu_worker.native.loop import Engine
from gpu_worker.native.openmp import run_on_short_lived_thread


class NativeEngine(InferenceEngine):
    """An Engine and its thread, in this process."""

    def __init__(self, thread: EngineThread, *, niceness: int = 0) -> None:
        """`niceness`: of the thread that tokenizes. The engine's thread has its own."""
        self.thread = thread
        self._engine = thread.engine
        max_waiting = self._engine.config.max_waiting
        self._tokenizing = Tokenizing(self._engine.prepare, max_waiting=max_waiting, niceness=niceness)
        self._prober = Prober(thread, self._engine.base.dtype)
        self._num_missing_kernels = num_missing_kernels(self._engine.config)

    @classmethod
    def start(
        cls,
        config: WorkerConfig,
        fetch: Fetch,
        *,
        executor: Executor | None = None,
        stream_interval_ms: float = 25.0,
        niceness: int = 0,
        free_fill: float = 0.0,
    ) -> NativeEngine:
        """Load the base model, compute the first steps, and start the engine's thread.

        `free_fill`: value of free bank rows, see LoraBank.
        Raises: BaseModelUnsupported, WorkerConfigInvalid, WarmUpFailed.
        """
        use_one_thread()

        def build() -> Engine:
            return warm_up(Engine(config, fetch, executor=executor, free_fill=free_fill))

        engine = run_on_short_lived_thread(build)
        thread = EngineThread(engine, stream_interval_ms=stream_interval_ms, niceness=niceness)
        return cls(thread, niceness=niceness)

    @property
    def module_shapes(self) -> Mapping[str, tuple[int, int]]:
        return self._engine.bank.shapes

    @property
    def num_missing_kernels(self) -> int:
        return self._num_missing_kernels

    def stream(self, job: Job, heartbeat_interval_s: float | None = None) -> AsyncGenerator[Delta | None]:
        return self.thread.stream_with_heartbeats(job, heartbeat_interval_s)

    async def generate(self, jobs: Sequence[Job]) -> list[Completion | Exception]:
        return await generate_all(self.thread, jobs)

    async def tokenize(
        self,
        prompt: Prompt,
        template: str,
        *,
        tenant: str,
        add_special_tokens: bool | None = None,
        with_texts: bool = False,
    ) -> Tokenized:
        return await self._tokenizing.tokenize(
            prompt, template, tenant=tenant, add_special_tokens=add_special_tokens, with_texts=with_texts
        )

    async def detokenize(self, prompts: Sequence[TokenIds], *, tenant: str, skip_special_tokens: bool) -> list[str]:
        return await self._tokenizing.detokenize(prompts, tenant=tenant, skip_special_tokens=skip_special_tokens)

    async def forget(self, weights_digests: Collection[str]) -> bool:
        return await self.thread.forget(weights_digests)

    async def status(self) -> EngineStatus:
        return await self.thread.status()

    async def expected(self) -> frozenset[str]:
        return await self.thread.expected()

    async def probe(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        return await self._prober.shifts(weights_digests)

    def health(self) -> EngineHealth:
        is_alive = self.thread.is_alive
        failure = None if is_alive else f"the engine's thread has ended: {self.thread.failure or 'it was stopped'}"
        return EngineHealth(is_alive, self.thread.seconds_busy(), failure)

    def kill(self) -> None:
        """Do nothing: the engine is part of this process."""

    def stop(self) -> None:
        self._tokenizing.close()
        self.thread.stop()
