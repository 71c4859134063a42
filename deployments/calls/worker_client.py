"""The Worker as its callers see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeStatus

from deployments.calls.heartbeat import HEARTBEAT_TIMEOUT_S, HeartbeatStream, StreamEnd
from deployments.calls.serve_calls import ServeCalls
from deployments.calls.store_client import Shapes
from deployments.calls.transport import over_grpc
from gpu_worker.engine.engine_status import EngineStatus
from gpu_worker.request.request import Delta, Job

_CAN_START = ("HEALTHY", "UPSCALING", "DOWNSCALING")  # UPDATING is the first start, or an upgrade


@dataclass(slots=True)
class Usage:
    """What one tenant has used of one Worker. Every field but `num_running` only rises."""

    num_running: int = 0  # in the engine or in its queue
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0


class WorkerCalls(Protocol):
    """The calls that any one replica answers."""

    async def module_shapes(self) -> Shapes: ...
    async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]: ...


class WorkerReplica(WorkerCalls, Protocol):
    """One replica of the Worker deployment. None in a stream is a heartbeat."""

    def stream(self, job: Job) -> AsyncIterator[Delta | None]: ...
    async def forget(self, weights_digests: Collection[str]) -> bool: ...
    async def load(self) -> EngineStatus: ...
    async def usage(self) -> Mapping[str, Usage]: ...


class DeltaStream(Protocol):
    """The deltas of one job, None for a heartbeat, then the end. `cancel` ends the job at its Worker."""

    def cancel(self) -> None: ...
    async def next(self, deadline: float) -> Delta | StreamEnd | None: ...


class WorkerClient(WorkerCalls, Protocol):
    """The Worker deployment. Broadcasts return the answer or error of each replica.

    Broadcasts raise DeploymentUnavailableError if no replica runs, and TimeoutError if one does not answer in time.
    """

    async def wait_for_replica(self) -> Shapes:
        """Return the module shapes once a replica runs; if there is none, the call makes Serve start one."""
        ...

    async def is_scaled_to_zero(self) -> bool:
        """Return whether no replica runs, and Serve can start one at the next call."""
        ...

    def stream(self, job: Job) -> DeltaStream: ...
    async def broadcast_forget(
        self, weights_digests: Collection[str], timeout_s: float
    ) -> list[bool | BaseException]: ...
    async def broadcast_load(self, timeout_s: float) -> list[EngineStatus | BaseException]: ...
    async def broadcast_usage(self, timeout_s: float) -> list[Mapping[str, Usage] | BaseException]: ...


class ServeWorker(WorkerClient):
    """Calls the Worker through Serve. `status` returns the state of Serve's applications; it blocks."""

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        status: Callable[[], ServeStatus] = serve.status,
    ) -> None:
        self._handle, self._heartbeat_timeout_s, self._status = handle, heartbeat_timeout_s, status
        self._calls: ServeCalls[WorkerReplica] = ServeCalls(handle)

    async def module_shapes(self) -> Shapes:
        return await self._calls.retry(WorkerReplica.module_shapes)

    async def wait_for_replica(self) -> Shapes:
        return await self._calls.once(WorkerReplica.module_shapes)

    async def is_scaled_to_zero(self) -> bool:
        status = await asyncio.to_thread(self._status)
        worker = status.applications[self._handle.app_name].deployments[self._handle.deployment_name]
        return worker.replica_states.get("RUNNING", 0) == 0 and worker.status in _CAN_START

    async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        return await self._calls.retry(WorkerReplica.probe_many, weights_digests)

    def stream(self, job: Job) -> DeltaStream:
        response = over_grpc(self._handle).options(stream=True).stream.remote(job)
        return HeartbeatStream(response, self._heartbeat_timeout_s)

    async def broadcast_forget(self, weights_digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        return await self._calls.broadcast(timeout_s, WorkerReplica.forget, weights_digests)

    async def broadcast_load(self, timeout_s: float) -> list[EngineStatus | BaseException]:
        return await self._calls.broadcast(timeout_s, WorkerReplica.load)

    async def broadcast_usage(self, timeout_s: float) -> list[Mapping[str, Usage] | BaseException]:
        return await self._calls.broadcast(timeout_s, WorkerReplica.usage)
