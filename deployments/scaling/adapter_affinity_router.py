"""Choose the worker replica for a request: one that holds its adapters and its conversation, if its queue is short."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from deployments.scaling import residency  # Serve pickles this module by value, but not the modules that it imports
from deployments.scaling.residency import HeardReports, short_digest
from gpu_worker.front.prefix import make_namespace
from gpu_worker.front.request.request import Job

_EXPECTED_S = 3.0  # until a worker with a late event loop has reported the adapters of a request that was sent to it
_LONGEST_QUEUE = (1.25, 2)  # factor of the mean and addend; replicas with longer queues are ranked last
_NUM_HOMES = 2  # replicas for adapters that none holds; more would load them everywhere, one could be overloaded


@dataclass(frozen=True, slots=True)
class Turn:
    """The prompt of a chat as digests over its namespace in the prefix cache and its messages.

    All of it, the turn before (b"" if there is none), and the first one. Scores and generations differ from turn to
    turn, and are left out.
    """

    whole: bytes
    previous: bytes
    first: bytes

    @classmethod
    def of(cls, args: Sequence[object]) -> Turn | None:
        """Return the turn that a call's Job continues or begins; None for other calls and prompts without messages."""
        job = args[0] if args else None
        if not isinstance(job, Job) or not isinstance(job.prompt, tuple):
            return None
        digest = hashlib.blake2b(make_namespace(job.plan, job.tenant, shares_base=False), digest_size=16)
        first = previous = b""
        for message in job.prompt:
            if message.role == "assistant":
                previous = digest.digest()
                first = first or previous
            digest.update(repr(message).encode(errors="surrogatepass"))
        whole = digest.digest()
        return cls(whole, previous, first or whole)


class AdapterAffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Ranks replicas by how many of the plan's adapters they hold; the shortest queue wins within a rank.

    A replica holds the adapters that its last heard report names, and those of requests sent to it since. Adapters that
    no replica holds have two home replicas, the same for every router, computed from the first adapter's digest and the
    replicas' ids. Replicas with a much longer queue than the others rank last. Calls without a Job go to the shortest
    queue.

    A later turn of a chat goes to the replica that got the turn before, whose prefix cache has most of it. A router
    that did not send that turn, because several routers share the clients, takes the conversation's home replica. First
    turns go there too, so that every router that knows the same holders finds the next one.
    """

    max_turns = 100_000  # remembered ones, 200 bytes each

    def initialize_state(self, heard: HeardReports | None = None) -> None:
        """Set up the state. Serve calls this once, before any replica is known, without `heard`."""
        self._heard = residency.HEARD if heard is None else heard
        self._expected: dict[ReplicaID, dict[bytes, float]] = {}  # digest -> expiry time, the earliest first
        self._turns: OrderedDict[bytes, ReplicaID] = OrderedDict()  # the replica that got it, the oldest first

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._expected = {r.replica_id: self._expected.get(r.replica_id, {}) for r in replicas}

    async def choose_replicas(
        self, candidate_replicas: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the ranks, best first. Among equal queues Ray takes the first replica, so their order is random."""
        replicas = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None:
            return [replicas]
        pending_request.routing_context.should_backoff = True  # otherwise Ray retries without a pause
        wanted, turn = _wanted(pending_request.args), Turn.of(pending_request.args)
        if turn is None or not replicas:
            return self._ranks(replicas, wanted) if wanted else [replicas]
        best, *others = [rank for rank in self._ranks(replicas, wanted) if rank]
        last = self._turns.get(turn.previous) if turn.previous else None
        best.sort(key=lambda r: (r.replica_id == last, _home_score(turn.first, r.replica_id)), reverse=True)
        return [best[:1], best[1:], *others]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        now = self._get_curr_time_s()
        expected = self._expected.setdefault(replica_id, {})
        for digest in _wanted(pending_request.args):
            expected.pop(digest, None)
            expected[digest] = now + _EXPECTED_S
        for digest in _overdue(expected, now):
            del expected[digest]
        if (turn := Turn.of(pending_request.args)) is not None:
            self._turns.pop(turn.whole, None)
            self._turns[turn.whole] = replica_id
            if len(self._turns) > self.max_turns:
                self._turns.popitem(last=False)

    # Ray 2.60 matches a chosen replica to its call by an id that all calls of one HTTP request share, so of several
    # concurrent calls only one would be sent. Here each call is identified by its own metadata.

    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        self._pending_requests_by_id.setdefault(id(pending_request.metadata), pending_request)

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        self._pending_requests_by_id.pop(id(pending_request.metadata), None)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        pending: PendingRequest | None = self._pending_requests_by_id.get(id(request_metadata))
        return None if pending is None or pending.future.done() else pending

    def _ranks(self, replicas: Sequence[RunningReplica], wanted: Sequence[bytes]) -> list[list[RunningReplica]]:
        queues = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in replicas}
        factor, slack = _LONGEST_QUEUE
        longest = factor * sum(queues.values()) / len(queues) + slack if queues else 0
        holding: defaultdict[int, list[RunningReplica]] = defaultdict(list)
        for replica in replicas:
            if queues[replica.replica_id] <= longest:
                holding[self._num_held(replica.replica_id, wanted)].append(replica)
        busy = [r for r in replicas if queues[r.replica_id] > longest]
        strangers = holding.pop(0, [])
        held = [holding[number] for number in sorted(holding, reverse=True)]
        if not wanted:
            return [strangers, busy]
        strangers.sort(key=lambda r: _home_score(wanted[0], r.replica_id), reverse=True)
        return [*held, strangers[:_NUM_HOMES], strangers[_NUM_HOMES:], busy]

    def _num_held(self, replica_id: ReplicaID, wanted: Iterable[bytes]) -> int:
        now = self._get_curr_time_s()
        held, expected = self._heard.held_by(replica_id.unique_id), self._expected.get(replica_id, {})
        return sum(digest in held or expected.get(digest, now) > now for digest in wanted)


def _wanted(args: Sequence[object]) -> list[bytes]:
    """Return short digests of the adapters in the call's Job, best first; nothing for other calls."""
    job = args[0] if args else None
    return [short_digest(adapter.weights_digest) for adapter in job.plan.adapters] if isinstance(job, Job) else []


def _overdue(expected: dict[bytes, float], now: float) -> list[bytes]:
    """Return the expired entries, which are the first ones."""
    overdue = []
    for digest, until in expected.items():
        if until > now:
            break
        overdue.append(digest)
    return overdue


def _home_score(digest: bytes, replica_id: ReplicaID) -> bytes:
    """Return the rendezvous hash: a new or removed replica moves only its own adapters."""
    return hashlib.blake2b(digest + replica_id.unique_id.encode(), digest_size=8).digest()
