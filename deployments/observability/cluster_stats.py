"""What all replicas hold and do at this moment, in one small object."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.api.responses import JsonObject
from deployments.config.app import AppConfig
from deployments.observability.tenant_usage import Usage
from gpu_worker.engine.engine_status import EngineStatus

KEPT_S = 0.5
_TIMEOUT_S = 3.0  # a worker answers between two steps


@dataclass(frozen=True, slots=True)
class Answers:
    """What the replicas of a deployment said. Where Ray 2.60 gives up on them all, one counts as silent."""

    given: Sequence[Any]
    num_silent: int

    @property
    def counts(self) -> JsonObject:
        return {"answered": len(self.given), "silent": self.num_silent}


class StatsReader:
    """Every worker is asked once per `KEPT_S`, however many clients look."""

    def __init__(
        self,
        config: AppConfig,
        retriever: DeploymentHandle,
        worker: DeploymentHandle,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._retriever, self._worker, self._clock = config, retriever, worker, clock
        self._reading: asyncio.Task[tuple[float, Answers, Answers]] | None = None
        self._began_s = 0.0

    async def read(self, tenant: str, *, sees_all: bool = True) -> JsonObject:
        """Return the figures, sums over the replicas that answered. Counters rise until a replica is replaced.

        Without `sees_all` they are the tenant's own: what the workers do for everybody is left out.
        """
        (read_at, workers, usages), retrievers = await asyncio.gather(
            self._workers(), _ask_all(self._retriever, "load", tenant)
        )
        retrieval = self._config.retrieval
        return {
            "object": "stats",
            "read_at": read_at,
            "base_model": self._config.served_base_name,
            "defaults": {"strategy": retrieval.strategy, "k": retrieval.k},
            "pool": _pool_object(retrievers) | {"replicas": retrievers.counts},
            "tenant": _usage_object([usage[tenant] for usage in usages.given if tenant in usage]),
            "workers": self._workers_object(workers.given) | {"replicas": workers.counts} if sees_all else None,
        }

    async def _workers(self) -> tuple[float, Answers, Answers]:
        is_fresh = self._reading is not None and (not self._reading.done() or self._clock() - self._began_s < KEPT_S)
        if self._reading is None or not is_fresh:
            self._began_s = self._clock()
            self._reading = asyncio.create_task(self._read_workers())
        return await asyncio.shield(self._reading)  # a client that leaves does not end the others' reading

    async def _read_workers(self) -> tuple[float, Answers, Answers]:
        may_be_none = self._config.workers_may_sleep
        asked = [_ask_all(self._worker, method, may_be_none=may_be_none) for method in ("load", "usage")]
        answers, usages = await asyncio.gather(*asked)
        return time.time(), answers, usages

    def _workers_object(self, holdings: Sequence[EngineStatus]) -> JsonObject:
        settings, counters = self._config.worker, [held.counters for held in holdings]
        return {
            "num_running": sum(held.num_running for held in holdings),
            "max_running": settings.max_batch_size * len(holdings),
            "num_waiting": sum(held.num_waiting for held in holdings),
            "bank_rows": settings.bank_rank_rows * len(holdings),
            "bank_rows_occupied": sum(held.occupied_rows for held in holdings),
            "bank_rows_active": sum(held.active_rows for held in holdings),
            "bank_adapters": sum(len(held.resident) for held in holdings),
            "host_cache_bytes": sum(held.host_cache_bytes for held in holdings),
            "host_cache_max_bytes": settings.host_cache_bytes * len(holdings),
            "requests": sum(counted.num_requests for counted in counters),
            "prompt_tokens": sum(counted.num_prompt_tokens for counted in counters),
            "new_tokens": sum(counted.num_new_tokens for counted in counters),
            "bank_hits": sum(counted.num_bank_hits for counted in counters),
            "host_hits": sum(counted.num_host_hits for counted in counters),
            "fetches": sum(counted.num_fetches for counted in counters),
            "preemptions": sum(counted.num_preemptions for counted in counters),
            "kv_tokens_free": sum(held.free_kv_tokens for held in holdings),
        }


def _usage_object(usages: Sequence[Usage]) -> JsonObject:
    return {
        "num_running": sum(usage.num_running for usage in usages),
        "requests": sum(usage.num_requests for usage in usages),
        "prompt_tokens": sum(usage.num_prompt_tokens for usage in usages),
        "new_tokens": sum(usage.num_new_tokens for usage in usages),
    }


def _pool_object(retrievers: Answers) -> JsonObject:
    """The newest generation any replica serves, what it has, and the oldest one; nulls where none answered."""
    if not retrievers.given:
        return {"generation": None, "oldest_generation": None, "num_adapters": None}
    generation, num_adapters = max(retrievers.given)
    return {"generation": generation, "oldest_generation": min(retrievers.given)[0], "num_adapters": num_adapters}


async def _ask_all(handle: DeploymentHandle, method: str, *args: str, may_be_none: bool = False) -> Answers:
    try:
        results = await handle.broadcast(method, *args).results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
    except DeploymentUnavailableError:  # no replica runs
        return Answers((), 0 if may_be_none else 1)
    except TimeoutError:
        return Answers((), 1)
    given = [result for result in results if not isinstance(result, BaseException)]
    return Answers(given, len(results) - len(given))
