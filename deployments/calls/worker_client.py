"""The client of the Worker: calls, streams with heartbeats, and starting a Worker if none runs.

Ray raises an error when a replica dies. If a node disappears, there is no error for a long time: gRPC notices after
minutes, Ray's own calls after about one. Workers therefore send a heartbeat every 5 s, and a stream is given up
after 30 s without any item. A call that brought none yet may still wait for a replica, so it is given up only if one
runs, and is then sent again. A Worker's heartbeats are reports of what it holds, which the request router reads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, Protocol, TypeVar

from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview, ServeStatus

from deployments.background import limit_time
from deployments.calls.shared import Shared
from deployments.calls.typed_client import LONG_WAIT_S, WAIT_S, ServeClient, retry
from deployments.errors import WorkerStarting
from deployments.scaling.residency import HEARD, ResidencyReport
from gpu_worker.errors import DeadlineExceeded
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Delta, Job, Prompt, TokenIds, Tokenized
from gpu_worker.front.request.tools import Tools
from lora_store import AdapterRecord
from lora_store.adapter import Shapes
from retriever_svc import ServedBases

logger = logging.getLogger(__name__)
HEARTBEAT_INTERVAL_S = 5.0
HEARTBEAT_TIMEOUT_S = 30.0  # tolerates a late event loop
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Item = TypeVar("Item")
Key = TypeVar("Key")
_CAN_START = ("HEALTHY", "UPSCALING", "DOWNSCALING")  # UPDATING is the first start, or an upgrade
# No call for this long after an answer: Serve removes a worker only after `downscale_delay_s` without requests.
KEPT_S = 1.0
# After an answer requests do not wait for the next one: the worker that is asked may hang while others run.
RECENT_S = 60.0
_PATIENCE_S = 10.0  # then the call is sent again if a worker runs: another one may answer


class StreamEnd(Enum):
    """Marks the end of a stream."""

    END = "end"


class StreamResponse(Protocol[T_co]):
    """Serve's response to a streaming call."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...
    def cancel(self) -> None: ...


SendAgain = Callable[[StreamResponse[T]], Awaitable[StreamResponse[T] | None]]


class HeartbeatStream(Generic[T]):
    """The items and heartbeats of one streaming call, which fails after `timeout_s` without either."""

    def __init__(
        self,
        response: StreamResponse[T | ResidencyReport | None],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        send_again: SendAgain[T | ResidencyReport | None] | None = None,
    ) -> None:
        """`send_again`: replaces a call that brought nothing for `timeout_s`, or returns None if no replica runs."""
        self._response, self._items, self._timeout_s, self._clock = response, aiter(response), timeout_s, clock
        self._send_again = send_again
        self._silent_at = float("inf")  # until the first item

    def cancel(self) -> None:
        """Cancel the work at the replica."""
        self._response.cancel()

    async def next(self, deadline: float) -> T | StreamEnd | None:
        """Return the next item, None for a heartbeat, or the end. `deadline` is a time of the clock.

        Raises: DeadlineExceeded; ActorUnavailableError if the replica fell silent or broke off the call; the stream's
        error.
        """
        until = min(deadline, self._silent_at)
        try:
            async with asyncio.timeout(until - self._clock()) as limit:
                has_begun = self._silent_at != float("inf")
                item = await (anext(self._items, StreamEnd.END) if has_begun else self._first())
        except TimeoutError as exc:
            if not limit.expired():
                raise
            if until == deadline:
                raise DeadlineExceeded(0) from exc
            raise ActorUnavailableError(f"no heartbeat for {self._timeout_s:.0f} s", None) from exc
        except AioRpcError as exc:  # Serve 2.60 translates only UNAVAILABLE
            raise ActorUnavailableError(f"gRPC broke the call off: {exc.code().name}", None) from exc
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ActorUnavailableError("the replica cancelled the call as it shut down", None) from exc
        self._silent_at = self._clock() + self._timeout_s
        if isinstance(item, tuple):  # a ResidencyReport, of this version of the server or another one
            HEARD.hear(item)
            return None
        if isinstance(item, Exception):  # a refusal, which the replica returned
            raise item
        return item

    async def _first(self) -> T | ResidencyReport | StreamEnd | None:
        """Return the first item. A replica sends one as soon as it has the call, so a silent call may be lost."""
        while True:
            asking = asyncio.ensure_future(anext(self._items, StreamEnd.END))
            # Retrieve the error of a call that is given up: asyncio would log it.
            asking.add_done_callback(lambda task: task.cancelled() or task.exception())
            try:
                again = None
                while not asking.done() and again is None:
                    await asyncio.wait([asking], timeout=self._timeout_s)
                    if not asking.done() and self._send_again is not None:
                        again = await self._send_again(self._response)
                if again is None:
                    return asking.result()
            finally:
                asking.cancel()
            self._response, self._items = again, aiter(again)


@dataclass(slots=True)
class Usage:
    """One tenant's usage of one Worker. Every field except `num_running` only increases."""

    num_running: int = 0  # rows in the engine or in its queue
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0


class WorkerCalls(Protocol):
    """Calls that any one replica answers. They are repeated if it dies."""

    @retry(within_s=WAIT_S)
    async def module_shapes(self) -> Shapes: ...
    @retry(within_s=LONG_WAIT_S)
    async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]: ...
    @retry
    async def tokenize(
        self,
        tenant: str,
        prompt: Prompt,
        template: str,
        add_special_tokens: bool | None,
        with_texts: bool,
        tools: Tools | None = None,
    ) -> Tokenized: ...
    @retry
    async def detokenize(self, tenant: str, prompts: Sequence[TokenIds], skip_special_tokens: bool) -> list[str]: ...


class WorkerReplica(WorkerCalls, Protocol):
    """One replica of the Worker deployment. A report in a stream is a heartbeat."""

    def stream(self, job: Job) -> AsyncIterator[Delta | ResidencyReport | None]: ...
    async def forget(self, weights_digests: Collection[str]) -> bool: ...
    async def load(self) -> EngineStatus: ...
    async def usage(self) -> Mapping[str, Usage]: ...


class WorkerClient(WorkerCalls, Protocol):
    """The Worker deployment of one base model. Broadcasts return the answer or error of each replica.

    Broadcasts raise DeploymentUnavailableError if no replica runs, and TimeoutError if one does not answer in time.
    """

    def stream(self, job: Job) -> HeartbeatStream[Delta]: ...
    async def broadcast_forget(
        self, weights_digests: Collection[str], timeout_s: float
    ) -> list[bool | BaseException]: ...
    async def broadcast_load(self, timeout_s: float) -> list[EngineStatus | BaseException]: ...
    async def broadcast_usage(self, timeout_s: float) -> list[Mapping[str, Usage] | BaseException]: ...

    async def wait_for_replica(self) -> Shapes:
        """Return the module shapes once a replica runs; if there is none, the call makes Serve start one."""
        ...

    async def is_scaled_to_zero(self) -> bool:
        """Return whether no replica runs, and Serve can start one at the next call."""
        ...


class ServeWorker(ServeClient[WorkerReplica], WorkerClient):
    """Calls the Worker through Serve. `status` returns the state of Serve's applications; it blocks."""

    def __init__(self, handle: DeploymentHandle, heartbeat_timeout_s: float, status: Callable[[], ServeStatus]) -> None:
        super().__init__(handle)
        self._handle, self._heartbeat_timeout_s, self._status = handle, heartbeat_timeout_s, status
        self._running = Shared(self._state, kept_s=KEPT_S)  # many calls are lost at once

    async def wait_for_replica(self) -> Shapes:
        return await self.calls.once(WorkerReplica.module_shapes)

    async def is_scaled_to_zero(self) -> bool:
        worker = await self._state()
        return worker.replica_states.get("RUNNING", 0) == 0 and worker.status in _CAN_START

    def stream(self, job: Job) -> HeartbeatStream[Delta]:
        # Over gRPC, which saves work for each token and heartbeat: docs/benchmarks/index.md states how much.
        handle = self._handle.options(method_name="stream", stream=True, _by_reference=False)
        began = time.monotonic()

        async def send_again(
            lost: StreamResponse[Delta | ResidencyReport | None],
        ) -> StreamResponse[Delta | ResidencyReport | None] | None:
            if not await self._runs():
                return None
            logger.warning("%s is sent again: no worker has taken it", job.request_id)
            lost.cancel()
            left_s = job.time_left_s
            if left_s is not None:
                left_s -= time.monotonic() - began
            again: StreamResponse[Delta | ResidencyReport | None] = handle.remote(replace(job, time_left_s=left_s))
            return again

        return HeartbeatStream(handle.remote(job), self._heartbeat_timeout_s, send_again=send_again)

    async def _runs(self) -> bool:
        """Return whether a replica runs, as far as Serve's controller tells."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return bool((await self._running.get()).replica_states.get("RUNNING"))
        except Exception:
            return False

    async def _state(self) -> DeploymentStatusOverview:
        status = await asyncio.to_thread(self._status)
        return status.applications[self._handle.app_name].deployments[self._handle.deployment_name]

    async def broadcast_forget(self, weights_digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        return await self.calls.broadcast(timeout_s, WorkerReplica.forget, weights_digests)

    async def broadcast_load(self, timeout_s: float) -> list[EngineStatus | BaseException]:
        return await self.calls.broadcast(timeout_s, WorkerReplica.load)

    async def broadcast_usage(self, timeout_s: float) -> list[Mapping[str, Usage] | BaseException]:
        return await self.calls.broadcast(timeout_s, WorkerReplica.usage)


def serve_worker(
    handle: DeploymentHandle,
    *,
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    status: Callable[[], ServeStatus] = serve.status,
) -> WorkerClient:
    """Return the client of a Worker deployment."""
    return ServeWorker(handle, heartbeat_timeout_s, status)  # type: ignore[abstract]  # as `serve_store`


class BaseWorkers:
    """The workers of one base model. A request passes `ready` first, which holds it until a worker runs.

    With `timeout_s` None workers never scale to zero, and nothing is held. The call that starts a worker stays in
    Serve's queue when its waiters have left, so the next request finds a worker. While an answer is recent, a worker
    is asked again in the background.
    """

    def __init__(
        self, client: WorkerClient, timeout_s: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.client = client
        self._timeout_s, self._clock = timeout_s, clock
        self.shapes: Shapes | None = None  # that a worker told; a base model's never change
        self._answered_at = float("-inf")  # by the clock: when a worker last told a request
        self._running = Shared(self._reach, kept_s=KEPT_S, clock=clock)

    async def ready(self) -> None:
        """Return when a worker runs. Raises: WorkerStarting; the error of a worker that just died."""
        if self._timeout_s is not None:
            await self._ask(self._timeout_s)

    async def module_shapes(self) -> Shapes:
        """Return the module shapes when a worker runs.

        Raises: WorkerStarting, NoAnswerInTime; the error of a worker that just died.
        """
        if self._timeout_s is not None:
            return await self._ask(self._timeout_s)
        self.shapes = await self.client.module_shapes()
        return self.shapes

    async def probe(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        """Return each adapter's shift or error. If the whole call fails, its error applies to each of them."""
        try:
            await self.module_shapes()
            return await self.client.probe_many(weights_digests)
        except Exception as exc:
            return [exc] * len(weights_digests)

    async def check(self) -> None:
        """Ask a worker, unless none runs because none is needed. Raises: the errors of the call."""
        if not await self.is_scaled_to_zero():
            self.shapes = await self.client.module_shapes()

    async def is_scaled_to_zero(self) -> bool:
        """Return whether no worker runs because none is needed: the next request starts one."""
        return self._timeout_s is not None and await self.client.is_scaled_to_zero()

    async def _ask(self, timeout_s: float) -> Shapes:
        asking = self._running.start()
        if self.shapes is not None and self._clock() - self._answered_at < RECENT_S:
            return self.shapes
        async with limit_time(asyncio.timeout(timeout_s), lambda: WorkerStarting(timeout_s)):
            return await asyncio.shield(asking)

    async def _reach(self) -> Shapes:
        """Return the module shapes. Wait until a worker has started, and call again if one runs and is silent."""
        while True:
            asking = asyncio.ensure_future(self.client.wait_for_replica())
            try:
                is_silent = False
                while not asking.done() and not is_silent:
                    await asyncio.wait([asking], timeout=_PATIENCE_S)
                    is_silent = not asking.done() and not await self.is_scaled_to_zero()
                if not is_silent:
                    self.shapes, self._answered_at = asking.result(), self._clock()
                    return self.shapes
            finally:
                asking.cancel()


async def answer_in_groups(
    items: Sequence[Item], key: Callable[[Item], Key], call: Callable[[Key, list[Item]], Awaitable[Sequence[T]]]
) -> list[T]:
    """Make one call for the items of each key. Return one answer for each item, in the order of the items."""
    groups: dict[Key, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(key(item), []).append(place)
    calls = [call(name, [items[place] for place in places]) for name, places in groups.items()]
    found: dict[int, T] = {}
    for places, answers in zip(groups.values(), await asyncio.gather(*calls), strict=True):
        found.update(zip(places, answers, strict=True))
    return [found[place] for place in range(len(items))]


class Workers:
    """The workers of every served base model. A job runs on those of its plan's base model."""

    def __init__(self, by_model: Mapping[str, BaseWorkers], bases: ServedBases | None = None) -> None:
        """`by_model`: the first ones answer where a plan names no base model."""
        self.by_model, self._bases = by_model, bases or ServedBases()

    def named(self, base_model: str) -> BaseWorkers:
        """Return the workers of the base model that a plan names; the first ones for ""."""
        return self.by_model[base_model] if base_model else next(iter(self.by_model.values()))

    def made_for(self, base_model: str) -> BaseWorkers:
        """Return the workers of the base model that an adapter names, in any of the names that publishing accepts."""
        return self.named(self._bases.find(base_model) or "")

    def has_same_base(self, first: str, second: str) -> bool:
        """Return whether two adapters that name these have one base model."""
        return first == second or self._bases.find(first) == self._bases.find(second)

    def stream(self, job: Job) -> HeartbeatStream[Delta]:
        return self.named(job.plan.base_model).client.stream(job)

    async def module_shapes(self) -> dict[str, Shapes]:
        """Return the module shapes of each base model whose workers have told them. Ask if there is only one.

        Raises: WorkerStarting, NoAnswerInTime, and the error of a worker that just died.
        """
        if len(self.by_model) == 1:
            await self.named("").module_shapes()
        return {name: workers.shapes for name, workers in self.by_model.items() if workers.shapes is not None}

    async def probe(self, adapters: Sequence[AdapterRecord]) -> list[float | Exception]:
        """Return each adapter's shift or error, from the workers of its base model."""
        return await answer_in_groups(
            adapters,
            lambda adapter: self.made_for(adapter.base_model),
            lambda workers, own: workers.probe([adapter.weights_digest for adapter in own]),
        )

    async def broadcast_forget(self, weights_digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        """Return the answers of all replicas. A base model without a replica has none.

        Raises: DeploymentUnavailableError if no base model has one; TimeoutError.
        """
        calls = [workers.client.broadcast_forget(weights_digests, timeout_s) for workers in self.by_model.values()]
        answers: list[bool | BaseException] = []
        unavailable: list[DeploymentUnavailableError] = []
        for found in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(found, DeploymentUnavailableError):
                unavailable.append(found)
            elif isinstance(found, BaseException):
                raise found
            else:
                answers += found
        if len(unavailable) == len(calls):
            raise unavailable[0]
        return answers
