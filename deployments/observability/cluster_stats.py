"""The current state of all replicas in one small object."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from ray.serve.exceptions import DeploymentUnavailableError

from deployments.api.pool_responses import Stats
from deployments.calls.catalogue_clients import RetrieverClient
from deployments.calls.shared import Shared
from deployments.calls.worker_client import Usage, Workers
from deployments.config.app import AppConfig
from deployments.json_types import JsonObject
from gpu_worker.front.engine_status import EngineStatus
from retriever_svc import PoolSize

KEPT_S = 0.5
_TIMEOUT_S = 3.0  # a worker answers between two steps

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReplicaAnswers(Generic[T]):
    """Answers of the replicas of a deployment. If Ray 2.60 gives up on all of them, one counts as silent."""

    given: Sequence[T]
    num_silent: int

    @property
    def counts(self) -> JsonObject:
        return {"answered": len(self.given), "silent": self.num_silent}


_Workers = tuple[ReplicaAnswers[EngineStatus], ReplicaAnswers[Mapping[str, Usage]]]


class StatsReader:
    """Reads the stats of all replicas, at most once per `KEPT_S` whatever the number of clients."""

    def __init__(
        self,
        config: AppConfig,
        retriever: RetrieverClient,
        workers: Workers,
        clock: Callable[[], float] = time.monotonic,
        *,
        evaluation_of: Callable[[str], JsonObject] | None = None,
    ) -> None:
        self._config, self._by_model = config, config.by_model
        self.defaults = config.retrieval
        self._retriever = retriever
        self._workers_of = workers
        self._evaluation_of = evaluation_of
        self._workers = Shared(self._read_workers, kept_s=KEPT_S, clock=clock)

    async def read(self, tenant: str, *, sees_all: bool = True) -> Stats:
        """Return sums over the replicas that answered. Counters rise until a replica is replaced.

        Without `sees_all` the answer covers only the tenant's own requests.
        """
        (read_at, found), retrievers = await asyncio.gather(
            self._workers.get(), _broadcast(partial(self._retriever.broadcast_load, tenant, _TIMEOUT_S))
        )
        usages = [usage for _, own in found.values() for usage in own.given]
        models = {name: self._workers_object(name, answers) for name, (answers, _) in found.items()}
        stats: Stats = {
            "object": "stats",
            "read_at": read_at,
            "base_model": self._config.served_models.first.name,
            "defaults": {
                "strategy": self.defaults.strategy,
                "k": self.defaults.k,
                "learning": self._config.learning,
            },
            "pool": _pool_object(retrievers) | {"replicas": retrievers.counts},
            "tenant": _usage_object([usage[tenant] for usage in usages if tenant in usage]),
            "evaluation": None if self._evaluation_of is None else self._evaluation_of(tenant),
            "workers": _sums(list(models.values())) if sees_all else None,
        }
        return {**stats, "models": models} if sees_all and len(models) > 1 else stats

    async def _read_workers(self) -> tuple[float, dict[str, _Workers]]:
        models = self._by_model
        found = await asyncio.gather(*[self._read_model(name, models[name]) for name in models])
        return time.time(), dict(zip(models, found, strict=True))

    async def _read_model(self, name: str, config: AppConfig) -> _Workers:
        client, may_be_none = self._workers_of.named(name).client, config.workers_scale_to_zero
        return await asyncio.gather(
            _broadcast(partial(client.broadcast_load, _TIMEOUT_S), may_be_none=may_be_none),
            _broadcast(partial(client.broadcast_usage, _TIMEOUT_S), may_be_none=may_be_none),
        )

    def _workers_object(self, name: str, answers: ReplicaAnswers[EngineStatus]) -> JsonObject:
        statuses, settings = answers.given, self._by_model[name].worker
        counters = [status.counters for status in statuses]
        return {
            "num_running": sum(status.num_running for status in statuses),
            "max_running": settings.max_batch_size * len(statuses),
            "num_waiting": sum(status.num_waiting for status in statuses),
            "bank_rows": settings.num_rank_rows * len(statuses),
            "bank_rows_occupied": sum(status.occupied_rows for status in statuses),
            "bank_rows_active": sum(status.active_rows for status in statuses),
            "bank_adapters": sum(len(status.resident) for status in statuses),
            "host_cache_bytes": sum(status.host_cache_bytes for status in statuses),
            "host_cache_max_bytes": settings.host_cache_bytes * len(statuses),
            "requests": sum(counter.num_requests for counter in counters),
            "prompt_tokens": sum(counter.num_prompt_tokens for counter in counters),
            "new_tokens": sum(counter.num_new_tokens for counter in counters),
            "bank_hits": sum(counter.num_bank_hits for counter in counters),
            "host_hits": sum(counter.num_host_hits for counter in counters),
            "fetches": sum(counter.num_fetches for counter in counters),
            "preemptions": sum(counter.num_preemptions for counter in counters),
            "cached_prompt_tokens": sum(counter.num_cached_tokens for counter in counters),
            "prefix_cache_tokens": sum(status.prefix_cache_tokens for status in statuses),
            "kv_tokens_free": sum(status.free_kv_tokens for status in statuses),
            "replicas": answers.counts,
        }


def _sums(objects: Sequence[JsonObject]) -> JsonObject:
    """Return the sums of the numbers of objects with the same fields."""
    return {
        name: _sums([item[name] for item in objects])
        if isinstance(value, dict)
        else sum(item[name] for item in objects)
        for name, value in objects[0].items()
    }


def _usage_object(usages: Sequence[Usage]) -> JsonObject:
    return {
        "num_running": sum(usage.num_running for usage in usages),
        "requests": sum(usage.num_requests for usage in usages),
        "prompt_tokens": sum(usage.num_prompt_tokens for usage in usages),
        "new_tokens": sum(usage.num_new_tokens for usage in usages),
    }


def _pool_object(retrievers: ReplicaAnswers[PoolSize]) -> JsonObject:
    """Describe the newest generation in service and the oldest one; null where no replica answered."""
    if not retrievers.given:
        return {"generation": None, "oldest_generation": None, "num_adapters": None}
    newest, oldest = max(retrievers.given), min(retrievers.given)
    return {
        "generation": newest.generation,
        "oldest_generation": oldest.generation,
        "num_adapters": newest.num_adapters,
    }


async def _broadcast(
    broadcast: Callable[[], Awaitable[Sequence[T | BaseException]]], *, may_be_none: bool = False
) -> ReplicaAnswers[T]:
    try:
        results = await broadcast()
    except DeploymentUnavailableError:  # no replica runs
        return ReplicaAnswers((), 0 if may_be_none else 1)
    except TimeoutError:
        return ReplicaAnswers((), 1)
    given = [result for result in results if not isinstance(result, BaseException)]
    return ReplicaAnswers(given, len(results) - len(given))
