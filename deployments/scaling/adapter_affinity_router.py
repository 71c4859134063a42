"""Which worker replica answers a request: one that holds its adapters already, unless too many wait there."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from gpu_worker.request.request import Job

RESIDENT = "resident"  # the key of that in a replica's routing stats
_EXPECTED_S = 3.0  # until what was sent shows in the stats: their period, and the way through the controller
_LONGEST_QUEUE = (1.25, 2)  # times the mean, plus: beyond it a replica's adapters draw nothing
_NUM_HOMES = 2  # replicas that may load what is seen nowhere; more would load it everywhere, one could be overrun


def short_digest(weights_digest: str) -> str:
    """48 bits: thousands of them travel every second, and a collision costs one load."""
    return weights_digest[:12]


class AdapterAffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Ranks replicas by how many of the plan's adapters they hold, and takes the shortest queue within a rank.

    Held is what a replica said it holds or will load for requests that wait there, and what was sent to it since.
    What no replica holds goes to one of two homes, the same for every router: they follow from the first adapter's
    digest and the replicas' ids. A replica whose queue is long beside the others' comes last, whatever it holds.
    Calls without a Job go to the shortest queue.
    """

    def initialize_state(self) -> None:
        """Serve calls it once, before any replica is known."""
        self._resident: dict[ReplicaID, frozenset[str]] = {}
        self._expected: dict[ReplicaID, dict[str, float]] = {}  # digest -> until when, the soonest first

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._resident = {r.replica_id: frozenset(r.routing_stats.get(RESIDENT, ())) for r in replicas}
        self._expected = {replica_id: self._expected.get(replica_id, {}) for replica_id in self._resident}

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks, best first. Of equal queues in a rank the first replica is taken, so their order is random."""
        replicas = random.sample(candidate_replicas, len(candidate_replicas))
        wanted: list[str] = []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Ray tries again without a pause
            wanted = _wanted(pending_request.args)
        return self._ranks(replicas, wanted) if wanted else [replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        now = self._get_curr_time_s()
        expected = self._expected.setdefault(replica_id, {})
        for digest in _wanted(pending_request.args):
            expected.pop(digest, None)
            expected[digest] = now + _EXPECTED_S
        for digest in _overdue(expected, now):
            del expected[digest]

    # Ray 2.60 finds the call that a replica was found for by an id that all calls of one HTTP request share: of several
    # under way at once only one would ever be sent. Here each is found by its own metadata.

    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        self._pending_requests_by_id.setdefault(id(pending_request.metadata), pending_request)

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        self._pending_requests_by_id.pop(id(pending_request.metadata), None)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        pending: PendingRequest | None = self._pending_requests_by_id.get(id(request_metadata))
        return None if pending is None or pending.future.done() else pending

    def _ranks(self, replicas: Sequence[RunningReplica], wanted: Sequence[str]) -> list[list[RunningReplica]]:
        queues = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in replicas}
        factor, slack = _LONGEST_QUEUE
        longest = factor * sum(queues.values()) / len(queues) + slack if queues else 0
        holding: defaultdict[int, list[RunningReplica]] = defaultdict(list)
        for replica in replicas:
            if queues[replica.replica_id] <= longest:
                holding[self._num_held(replica.replica_id, wanted)].append(replica)
        strangers = sorted(holding.pop(0, []), key=lambda r: _home_score(wanted[0], r.replica_id), reverse=True)
        busy = [r for r in replicas if queues[r.replica_id] > longest]
        held = [holding[number] for number in sorted(holding, reverse=True)]
        return [*held, strangers[:_NUM_HOMES], strangers[_NUM_HOMES:], busy]

    def _num_held(self, replica_id: ReplicaID, wanted: Iterable[str]) -> int:
        now = self._get_curr_time_s()
        resident, expected = self._resident.get(replica_id, frozenset()), self._expected.get(replica_id, {})
        return sum(digest in resident or expected.get(digest, now) > now for digest in wanted)


def _wanted(args: Sequence[object]) -> list[str]:
    """Short digests of the adapters that the call's Job names, the best one first; none of other calls."""
    job = args[0] if args else None
    return [short_digest(adapter.weights_digest) for adapter in job.plan.adapters] if isinstance(job, Job) else []


def _overdue(expected: dict[str, float], now: float) -> list[str]:
    """The entries whose time is over: all of them stand before the others."""
    overdue = []
    for digest, until in expected.items():
        if until > now:
            break
        overdue.append(digest)
    return overdue


def _home_score(digest: str, replica_id: ReplicaID) -> bytes:
    """Rendezvous hashing: a replica that comes or goes moves only the adapters that are its own."""
    return hashlib.blake2b(f"{digest} {replica_id.unique_id}".encode(), digest_size=8).digest()
