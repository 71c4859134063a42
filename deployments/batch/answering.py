"""An engine in this process over a store, and the second stage of a batch run: answer a part's rows and write them."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeGuard

from deployments.batch.output import BatchOutput
from deployments.batch.planning import PlannedPart
from deployments.batch.rows import answered, make_bodies, usage_line
from deployments.batch.run import BatchRun
from deployments.calls.worker_client import answer_in_groups
from deployments.config.app import AppConfig
from deployments.generation.planner import AUTO
from deployments.json_types import JsonObject
from deployments.weights import StoredWeights, WeightsFetcher
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.config import NativeWorkerConfig, VllmWorkerConfig
from gpu_worker.engine import InferenceEngine
from gpu_worker.errors import AdapterLoadFailed, AdapterLost, EngineFull, EngineStopped, GpuWorkerError
from gpu_worker.front.request.request import Completion, Job
from gpu_worker.start import start_engine
from lora_store import AdapterWeights, LoraStore
from lora_store.disk_cache import DiskCache

PARTS_AT_ONCE = 2  # the next part keeps the batch full while the last rows of one end
REPEAT_PAUSES_S = (1.0, 5.0, 20.0, 60.0, 120.0)  # before rows are repeated; from the first again after an answer
_MAX_TRIES = 2  # after the first: memory on a shared device may have been short for a moment


class OfflineEngine:
    """The engine that the settings name, in this process, with weights from the store. Rows have no deadline.

    It has a thread with an event loop of its own, so it may be called from any event loop.
    """

    def __init__(
        self,
        config: NativeWorkerConfig | VllmWorkerConfig,
        store: LoraStore,
        weights_cache: tuple[Path, int] | None,
        max_waiting: int,
    ) -> None:
        """Start the engine. Raises: BaseModelUnsupported, WorkerConfigInvalid, WarmUpFailed."""
        worker = replace(config, max_waiting=max_waiting, max_wait_s=math.inf)
        self._executor = load_executor(worker.load_threads)
        cache = None if weights_cache is None else DiskCache(*weights_cache)
        self._fetcher = WeightsFetcher(StoredWeights(store), self._executor, cache=cache)
        self._asyncio_loop = asyncio.new_event_loop()
        self._turn = asyncio.Lock()
        self._stopping = asyncio.Event()
        started: Future[InferenceEngine] = Future()
        self._thread = threading.Thread(target=self._run, args=(worker, started), name="offline-engine", daemon=True)
        self._thread.start()
        try:
            self.engine = started.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the engine and free its memory."""
        with suppress(RuntimeError):  # the event loop is closed, because the engine did not start
            self._asyncio_loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._executor.shutdown(wait=False)

    async def complete(self, jobs: Sequence[Job]) -> list[Completion | Exception]:
        """Answer all rows at once, then repeat those that may be answered later and those whose engine step failed.

        Raises: EngineStopped.
        """
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._complete(jobs), self._asyncio_loop))

    def _run(self, worker: NativeWorkerConfig | VllmWorkerConfig, started: Future[InferenceEngine]) -> None:
        """Run the event loop until the engine has stopped."""
        with asyncio.Runner(loop_factory=lambda: self._asyncio_loop) as runner:
            runner.run(self._serve(worker, started))

    async def _serve(self, worker: NativeWorkerConfig | VllmWorkerConfig, started: Future[InferenceEngine]) -> None:
        try:
            engine = await start_engine(worker, self._start_fetch, executor=self._executor)
        except BaseException as exc:
            started.set_exception(exc)
            return
        started.set_result(engine)
        await self._stopping.wait()
        engine.stop()

    async def _complete(self, jobs: Sequence[Job]) -> list[Completion | Exception]:
        outcomes = await self.engine.generate(jobs)
        waiting = [place for place, outcome in enumerate(outcomes) if _may_be_answered_later(outcome)]
        pauses_s = iter(REPEAT_PAUSES_S)
        while waiting and (pause_s := next(pauses_s, None)) is not None:
            await asyncio.sleep(pause_s)
            again = await self.engine.generate([jobs[place] for place in waiting])
            for place, outcome in zip(waiting, again, strict=True):
                outcomes[place] = outcome
            left = [place for place in waiting if _may_be_answered_later(outcomes[place])]
            if len(left) < len(waiting):
                pauses_s = iter(REPEAT_PAUSES_S)
            waiting = left
        return [
            await self._again(job) if isinstance(outcome, EngineStopped) else outcome
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    async def _again(self, job: Job) -> Completion | Exception:
        """Return the row's answer, repeating one such row at a time.

        Raises: EngineStopped if the engine has ended and cannot answer any more rows.
        """
        async with self._turn:
            for _ in range(_MAX_TRIES):
                [outcome] = await self.engine.generate([job])
                if not isinstance(outcome, EngineStopped):
                    break
            return outcome

    def _start_fetch(self, weights_digest: str) -> Future[AdapterWeights]:
        """Start a fetch on the event loop. The engine may call this from another thread."""
        return self._fetcher.start(weights_digest, self._asyncio_loop)


class OfflineEngines:
    """The engines of the served base models in this process. Of several, each starts with the first row for it."""

    def __init__(self, config: AppConfig, store: LoraStore, max_waiting: int) -> None:
        """Start the engine of an only base model. Raises: as `named`."""
        self._models, self._settings = config.served_models, config.by_model
        self._store, self._max_waiting = store, max_waiting
        self._engines: dict[str, OfflineEngine] = {}
        self._lock = threading.Lock()
        if len(self._settings) == 1:
            self.named("")

    def named(self, base_model: str) -> OfflineEngine:
        """Return the engine of the base model that a plan names, and start it if it is not running.

        Raises: BaseModelUnsupported, WorkerConfigInvalid, WarmUpFailed.
        """
        name = self._models.by_name[base_model].name
        with self._lock:
            if name not in self._engines:
                own = self._settings[name]
                self._engines[name] = OfflineEngine(
                    own.worker_config(), self._store, own.weights_cache, self._max_waiting
                )
            return self._engines[name]

    async def complete(self, jobs: Sequence[Job]) -> list[Completion | Exception]:
        """Answer all rows at once, each on its base model, in their order. Raises: EngineStopped, and as `named`."""
        names = dict.fromkeys(job.plan.base_model for job in jobs)
        engines = {name: await asyncio.to_thread(self.named, name) for name in names}
        return await answer_in_groups(
            jobs, lambda job: job.plan.base_model, lambda name, own: engines[name].complete(own)
        )

    def close(self) -> None:
        """Stop the engines and free their memory."""
        with self._lock:
            for engine in self._engines.values():
                engine.close()


class PartAnswerer(OfflineEngines):
    """Answers and writes whole parts."""

    def __init__(self, run: BatchRun) -> None:
        config = run.settings.config
        store = LoraStore(config.store_uri, accepts_base=config.served_models.accepted_names)
        with suppress(GpuWorkerError):  # raised again by the first part: Ray prints the stack trace of a constructor
            super().__init__(config, store, (PARTS_AT_ONCE + 1) * run.settings.part_rows)
        self._batch, self._usage = run, store.usage
        self._output = BatchOutput(run.settings.output_uri)

    async def __call__(self, row: JsonObject) -> dict[str, int]:
        """Answer the part in `row`. Ray Data calls this with several parts at once."""
        return await self.answer(row["planned"])

    async def answer(self, planned: PlannedPart) -> dict[str, int]:
        """Answer and write one part. Return its numbers of rows and errors.

        Raises: AdapterLoadFailed if weights cannot be fetched now; EngineFull if grammars cannot be compiled now;
        EngineStopped, StoreUnavailable.
        """
        jobs = [asked.job for asked in planned.asked if asked.job is not None]
        found = await self.complete(jobs)
        for failed in filter(_may_be_answered_later, found):
            raise failed
        answers = iter(found)
        outcomes = [None if asked.job is None else next(answers) for asked in planned.asked]
        part = answered(planned.rows, planned.asked, outcomes, self._batch.settings.answer)
        await asyncio.to_thread(self._record, planned, outcomes)
        await asyncio.to_thread(self._output.write, planned.part.number, part)
        return {"num_rows": part.num_rows, "num_errors": part.num_rows - part["error"].null_count}

    def _record(self, planned: PlannedPart, outcomes: Sequence[Completion | Exception | None]) -> None:
        """Store the usage of the part. A part that is answered again, on a later day too, counts once.

        Older usage stays: the settings of a run may keep it for less time than those of the pool's server.
        """
        settings = self._batch.settings
        if settings.config.usage_days:
            segment = f"{self._batch.id}-{planned.part.number}"
            models = [body.get("model", AUTO) for body in make_bodies(planned.rows, settings.defaults)]
            first = settings.config.served_models.first.name
            lines = [
                usage_line(f"{segment}-{row}", settings.tenant, model, first, asked, outcome, self._batch.began_at)
                for row, (model, asked, outcome) in enumerate(zip(models, planned.asked, outcomes, strict=True))
            ]
            self._usage.put(segment, b"".join(lines), datetime.now(UTC), kept=None)


def _may_be_answered_later(outcome: Completion | Exception) -> TypeGuard[AdapterLoadFailed | EngineFull]:
    """Return whether the row only lacks weights that the store may give later, or a place in a queue of the engine.

    A row has no place if too many other rows wait for grammars of their own to be compiled.
    """
    return isinstance(outcome, AdapterLoadFailed | EngineFull) and not isinstance(outcome, AdapterLost)
