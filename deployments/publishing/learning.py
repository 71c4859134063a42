"""Learn from clients: accept proposed samples, and apply the outcomes of a tenant's requests to its own choices."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

from deployments.api.responses import Published
from deployments.background import Background
from deployments.calls.catalogue_clients import RetrieverClient, StoreClient
from deployments.errors import RequestInvalid, RequestNotKept
from deployments.publishing.publisher import Publisher
from deployments.publishing.validator import Charge
from lora_store import AdapterRefused, Feedback, Key
from retriever_svc.learning import OWN_PER_ACCEPTED

logger = logging.getLogger(__name__)
QUIET_S = 1.0  # from an outcome to its application, so that one commit follows several
REST_FACTOR = 9  # the pause after an application, as a multiple of its time: a tenant's cost a tenth of a thread
RETRY_S, LONGEST_RETRY_S = 10.0, 600.0  # from a failed application to the next attempt: doubled each time
MAX_AT_ONCE = 2  # applications, so that no tenant keeps all others waiting
Sleep = Callable[[float], Awaitable[None]]


class Learning:
    """Changes samples by proposals that their owner accepts, and a tenant's own choices by its outcomes.

    `applies`: whether outcomes change choices. Otherwise they are kept and counted only.
    """

    def __init__(
        self,
        store: StoreClient,
        retriever: RetrieverClient,
        publisher: Publisher,
        background: Background,
        *,
        applies: bool,
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._retriever, self._publisher = store, retriever, publisher
        self._background, self._applies = background, applies
        self._sleep, self._clock = sleep, clock
        self._waiting: dict[str, str] = {}  # by tenant, the author of its newest outcome
        self._applying: set[str] = set()  # tenants, those that rest included
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def accept(
        self, key: Key, ids: Collection[str] | None, actor: str, charge: Charge
    ) -> tuple[Published, list[str]]:
        """Publish the live version with these proposals, or all, among its samples. Return what was left out.

        Raises: AdapterNotFound; RequestInvalid for an unknown id; AdapterRefused if it has too few samples of its own,
        or the pool's own samples would suffer; the errors of a publish.
        """
        [live, *_], chosen = await self._publisher.kept(key), await self._proposals(key, ids)
        resampled = await self._retriever.accept(live, [proposal.text for proposal in chosen])
        num_own = sum(not sample.is_accepted for sample in resampled.samples)
        if num_own < OWN_PER_ACCEPTED:
            reason = f"it has {num_own} published samples, but needs {OWN_PER_ACCEPTED} for each accepted prompt"
            raise AdapterRefused(key[1], [f"{reason}: publish it again with more samples"])
        if resampled.effect.refusal is not None:
            raise AdapterRefused(key[1], [f"{resampled.effect.refusal}: accept other prompts, or fewer"])
        published = await self._publisher.resample(live, resampled.samples, actor, charge)
        await self._store.delete_proposals(*key, [proposal.id for proposal in chosen])
        return published, list(resampled.left_out)

    async def reject(self, key: Key, ids: Collection[str] | None) -> int:
        """Drop these proposals, or all, and return how many there were.

        The same prompts of the same keys do not return as long as `FeedbackFiles` keeps their rejection.

        Raises: AdapterNotFound; RequestInvalid for an unknown id.
        """
        await self._publisher.kept(key)  # or it is not found
        chosen = await self._proposals(key, ids)
        for proposal in chosen:
            empty = Feedback(proposal.id, "", proposal.adapter, proposal.key_id)
            await self._store.put_feedback(key[0], "proposed", empty)
        return len(chosen)

    async def undo(self, key: Key, actor: str, charge: Charge) -> Published:
        """Publish the live version without its accepted prompts. Raises: AdapterNotFound; the errors of a publish."""
        [live, *_] = await self._publisher.kept(key)
        return await self._publisher.resample(live, None, actor, charge)

    async def judge(self, tenant: str, outcome: tuple[str, str | None, float], key_id: str) -> None:
        """Record an outcome: the request's id, the adapter or None for the base model, and the score.

        Raises: RequestNotKept, AdapterNotFound.
        """
        request_id, adapter, score = outcome
        asked = await self._store.asked(tenant, request_id)
        if asked is None:
            raise RequestNotKept(request_id)
        if adapter is not None:
            _, [record, *_] = await self._retriever.record(tenant, adapter)
            adapter = f"{record.ref.tenant}/{record.ref.name}"  # one name for it, however the client wrote it
        judged = Feedback.of_request(request_id, asked.text, adapter, key_id, score)
        await self._store.put_feedback(tenant, "outcome", judged)
        if self._applies:
            self._let_wait(tenant, key_id)

    async def apply_again(self, actor: str) -> None:
        """Apply the outcomes of every tenant again, in the background: another encoder gives them other vectors."""
        if self._applies:
            for tenant in await self._store.tenants_with_outcomes():
                self._let_wait(tenant, actor)

    def _let_wait(self, tenant: str, actor: str) -> None:
        self._waiting[tenant] = actor
        if tenant not in self._applying:
            self._applying.add(tenant)
            self._background.start(self._apply_waiting(tenant), "applying outcomes")

    async def _apply_waiting(self, tenant: str) -> None:
        pause_s = RETRY_S
        try:
            while tenant in self._waiting:
                await self._sleep(QUIET_S)
                took_s, has_failed = await self._apply_in_turn(tenant)
                await self._sleep(REST_FACTOR * took_s + (pause_s if has_failed else 0.0))
                pause_s = min(2 * pause_s, LONGEST_RETRY_S) if has_failed else RETRY_S
        finally:
            self._applying.discard(tenant)

    async def finish(self, within_s: float) -> None:
        """Apply the outcomes that wait, without their pauses and for at most `within_s`, because the replica ends.

        Those of a tenant that cannot be applied are not tried again.
        """
        failed: set[str] = set()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while (tenant := next((each for each in self._waiting if each not in failed), None)) is not None:
                    _, has_failed = await self._apply_in_turn(tenant)
                    if has_failed:
                        failed.add(tenant)
                for _ in range(MAX_AT_ONCE):  # what is applied now ends first
                    await self._turns.acquire()
                for _ in range(MAX_AT_ONCE):
                    self._turns.release()

    async def _apply_in_turn(self, tenant: str) -> tuple[float, bool]:
        """Apply the outcomes of a tenant if any still wait. Return how many seconds it took, and whether it failed.

        After a failure they wait again. What was applied before it is applied once more, which changes nothing.
        """
        async with self._turns:
            began_s, has_failed = self._clock(), False
            if (actor := self._waiting.pop(tenant, None)) is not None:
                try:
                    await self._apply(tenant, actor)
                except Exception:
                    has_failed = True
                    self._waiting.setdefault(tenant, actor)  # unless a newer outcome came meanwhile
                    logger.exception("the outcomes of tenant %s could not be applied and still wait", tenant)
            return self._clock() - began_s, has_failed

    async def _apply(self, tenant: str, actor: str) -> None:
        outcomes = await self._store.feedback(tenant, "outcome")
        learnt = await self._retriever.learn(tenant, outcomes)
        if learnt.num_refused:
            logger.warning("%d outcomes of tenant %s are left out: they would harm samples", learnt.num_refused, tenant)
        generation = await self._store.rank(tenant, learnt.rankings, actor, are_outcomes=True)
        if learnt.num_left or await self._store.feedback(tenant, "outcome") != outcomes:
            self._waiting.setdefault(tenant, actor)  # another replica may have applied newer ones before this commit
        await self._publisher.catch_up(generation)

    async def _proposals(self, key: Key, ids: Collection[str] | None) -> Sequence[Feedback]:
        found = await self._store.feedback(key[0], "proposed", key[1])
        wanted = {proposal.id for proposal in found} if ids is None else set(ids)
        unknown = wanted - {proposal.id for proposal in found}
        if unknown or not wanted:
            what = f"no prompt {min(unknown)!r} is" if unknown else "no prompt is"
            raise RequestInvalid(f"ids: {what} proposed for {key[1]!r}; list the proposed ones first", "ids")
        return [proposal for proposal in found if proposal.id in wanted]


def counted(tenant: str, outcomes: Sequence[Feedback]) -> dict[str, dict[str, int]]:
    """Return how many outcomes praise and how many blame each adapter, as the tenant names it; "" is the base model."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        own = counts.setdefault((outcome.adapter or "").removeprefix(f"{tenant}/"), {"positive": 0, "negative": 0})
        own["positive"] += outcome.score > 0
        own["negative"] += outcome.score < 0
    return counts
