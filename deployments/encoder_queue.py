"""Queue texts for the encoder: tenants take turns, and one tenant cannot fill the queue."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from deployments.errors import EncoderBusy
from deployments.scaling.autoscaling_policy import BUSY, WAITING_S
from gpu_worker.front.fair_share import FairShare
from retriever_svc.encoder import MAX_TOKENS, tokens_read

T = TypeVar("T")
TURN_TOKENS = MAX_TOKENS  # tokens of text per turn: one full text
BATCH_TOKENS = 8 * TURN_TOKENS  # tokens per batch: more would only delay the next batch


@dataclass(eq=False)
class _Asked(Generic[T]):
    """One call: its waiting texts, the answers so far, and the future that its caller awaits."""

    tenant: str
    number: int
    waiting: deque[tuple[int, str]]  # (position in the call, text)
    answered: asyncio.Future[list[T]]
    answers: dict[int, T] = field(default_factory=dict)
    num_texts: int = 0


_Waiting: TypeAlias = tuple[_Asked[T], int, str]  # (call, position in the call, text)


class EncoderLoad:
    """The share of time in which a replica's encoder works, and the mean time that it takes for a text."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._read_at = clock, clock()
        self._busy_since: float | None = None
        self._busy_s = self._total_s = 0.0
        self._num_texts = 0

    @contextmanager
    def encoding(self, num_texts: int) -> Iterator[None]:
        """Count the time in this context as that of a batch. One batch runs after the other."""
        started = self._busy_since = self._clock()
        try:
            yield
        finally:
            self._busy_s += self._clock() - self._busy_since
            self._total_s += self._clock() - started
            self._num_texts += num_texts
            self._busy_since = None

    def read(self, num_waiting: int) -> dict[str, float]:
        """Return the inputs of `RetrieverScaling` since the last reading, with this many texts waiting."""
        now = self._clock()
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = now
        busy = self._busy_s / max(now - self._read_at, 1e-3)
        self._read_at, self._busy_s = now, 0.0
        return {BUSY: busy, WAITING_S: num_waiting * self._total_s / max(self._num_texts, 1)}


class EncoderQueue(Generic[T]):
    """Passes one batch of texts after the other to `encode`. Use it on one event loop.

    Turns: in a turn, a tenant gets about `TURN_TOKENS` of texts of one call. Tenants take turns, and so do the calls of
    a tenant. So a short text waits for the current batch, and then for at most one turn of each other tenant.
    Places: at most `max_waiting` texts wait. Tenants share them by the rule of FairShare, call by call.
    Errors: a batch that fails is encoded again by tenant, then by text. A text that fails alone fails its call.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[tuple[str, str]]], Awaitable[Sequence[T]]],
        *,
        batch_size: int,
        max_waiting: int,
    ) -> None:
        """Create a queue. `encode` takes (tenant, text) pairs."""
        self._encode, self._batch_size, self._max_waiting = encode, batch_size, max_waiting
        self._tenants: dict[str, deque[_Asked[T]]] = {}  # in order of turn
        self._places = FairShare()
        self._numbers = itertools.count()
        self._feeding: asyncio.Task[None] | None = None
        self._load = EncoderLoad()

    async def encoded(self, tenant: str, texts: Sequence[str]) -> list[T]:
        """Return the result of `encode` for each text, in order. If the caller leaves, its texts leave the queue.

        Raises: EncoderBusy; the error of `encode` for one of these texts alone.
        """
        if not texts:
            return []
        self._make_room(tenant, len(texts))
        future: asyncio.Future[list[T]] = asyncio.get_running_loop().create_future()
        asked = _Asked(tenant, next(self._numbers), deque(enumerate(texts)), future, num_texts=len(texts))
        self._tenants.setdefault(tenant, deque()).append(asked)
        self._places.take(tenant, len(texts))
        if self._feeding is None or self._feeding.done():
            self._feeding = asyncio.create_task(self._feed())
        try:
            return await future
        except asyncio.CancelledError:
            self._drop(asked)
            raise

    @property
    def num_waiting(self) -> int:
        return self._places.num_held

    def read_load(self) -> dict[str, float]:
        """Return the inputs of `RetrieverScaling` since the last reading."""
        return self._load.read(self.num_waiting)

    async def _feed(self) -> None:
        await asyncio.sleep(0)
        while batch := self._next_batch():
            await self._answer(batch)

    async def _answer(self, batch: Sequence[_Waiting[T]]) -> None:
        """Encode a batch. If that fails, encode it in parts, so that only a text that fails alone fails its call."""
        try:
            with self._load.encoding(len(batch)):
                answers = await self._encode([(asked.tenant, text) for asked, _, text in batch])
            answered = list(zip(batch, answers, strict=True))
        except Exception as exc:
            parts = _parts(batch)
            if not parts:
                self._fail(batch[0][0], exc)
        else:
            parts = []
            for (asked, place, _), answer in answered:
                asked.answers[place] = answer
                if len(asked.answers) == asked.num_texts and not asked.answered.done():
                    asked.answered.set_result([asked.answers[at] for at in range(asked.num_texts)])
        for part in parts:
            if still_wanted := [item for item in part if not item[0].answered.done()]:
                await self._answer(still_wanted)

    def _next_batch(self) -> list[_Waiting[T]]:
        batch: list[_Waiting[T]] = []
        tokens = 0
        while self._tenants and len(batch) < self._batch_size and tokens < BATCH_TOKENS:
            tenant, calls = next(iter(self._tenants.items()))
            asked, spent = calls.popleft(), 0
            while asked.waiting and spent < TURN_TOKENS and len(batch) < self._batch_size:
                place, text = asked.waiting.popleft()
                batch.append((asked, place, text))
                self._places.give(tenant)
                spent += tokens_read(text)
            tokens += spent
            if asked.waiting:
                calls.append(asked)
            del self._tenants[tenant]
            if calls:
                self._tenants[tenant] = calls  # after the others
        return batch

    def _make_room(self, tenant: str, num_texts: int) -> None:
        """Make room for a call, or refuse it, which displaces no other. Raises: EncoderBusy."""
        left = self._places.copy()
        calls: dict[str, list[_Asked[T]]] = {}  # of tenants that give way, the newest last
        displaced: list[_Asked[T]] = []
        while left.num_held + num_texts > self._max_waiting:
            most = left.displaced_by(tenant, self._max_waiting, num_texts)
            if most is None:
                raise EncoderBusy(self.num_waiting, has_read=False)
            if most not in calls:
                calls[most] = sorted(self._tenants[most], key=lambda asked: asked.number)
            displaced.append(calls[most].pop())
            left.give(most, len(displaced[-1].waiting))
        for asked in displaced:
            self._fail(asked, EncoderBusy(self.num_waiting, has_read=len(asked.waiting) < asked.num_texts))

    def _fail(self, asked: _Asked[T], error: Exception) -> None:
        self._drop(asked)
        if not asked.answered.done():
            asked.answered.set_exception(error)

    def _drop(self, asked: _Asked[T]) -> None:
        """Remove all waiting texts of the call."""
        calls = self._tenants.get(asked.tenant)
        if calls is None or asked not in calls:
            return
        calls.remove(asked)
        self._places.give(asked.tenant, len(asked.waiting))
        asked.waiting.clear()
        if not calls:
            del self._tenants[asked.tenant]


def _parts(batch: Sequence[_Waiting[T]]) -> list[list[_Waiting[T]]]:
    """Split a batch by tenant, and a batch of one tenant by text. A single text has no parts."""
    parts: dict[str, list[_Waiting[T]]] = {}
    for item in batch:
        parts.setdefault(item[0].tenant, []).append(item)
    if len(parts) > 1:
        return list(parts.values())
    return [[item] for item in batch] if len(batch) > 1 else []
