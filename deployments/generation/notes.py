"""Note prompts from which the server may learn: those of requests that name an adapter, and those that it routed.

Nothing is noted unless the setting `learning` is on. Noting never delays or fails a request.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from deployments.api.completions import Question
from deployments.api.responses import Planned
from deployments.auth.authenticator import ANONYMOUS_TENANT, Caller
from deployments.background import Background
from deployments.calls.catalogue_clients import StoreClient
from deployments.generation.conversation import choose_texts
from gpu_worker.front.request.request import TokenIds
from lora_store import Feedback
from lora_store.feedback import Kind
from lora_store.lru_cache import LruCache
from retriever_svc.views import read_ends

PAUSE_S = 60.0  # between two proposals of one key for one adapter
MAX_NOTED = 20  # prompts of one tenant in one second
MAX_RUNNING = 32  # writes at once, of one tenant at most as many as there is room for others; more are dropped
_MAX_REMEMBERED = 4096


class PromptNotes:
    """The notes of one Ingress replica. `is_on`: whether prompts may be kept at all."""

    def __init__(
        self,
        store: StoreClient,
        background: Background,
        *,
        is_on: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._background, self._is_on, self._clock = store, background, is_on, clock
        self._proposed_at: LruCache[tuple[str, str, str], float] = LruCache(_MAX_REMEMBERED)
        self._noted: LruCache[str, tuple[int, int]] = LruCache(_MAX_REMEMBERED)  # by tenant, a second and its prompts
        self._running: Counter[str] = Counter()  # by tenant

    def note(self, question: Question, planned: Planned, caller: Caller, request_id: str) -> None:
        """Note the prompt of one request in the background, if it may be kept."""
        text = _find_text(question) if self._is_on and caller.tenant != ANONYMOUS_TENANT else None
        if text is None:
            return
        rows = planned.plan.adapters
        if planned.reason is not None:
            if planned.text.strip() and self._has_room(caller.tenant):
                self._start(caller.tenant, "asked", Feedback.of_request(request_id, planned.text, None, caller.key_id))
        elif _names_adapter(question) and len(rows) == 1 and rows[0].ref.tenant == caller.tenant:
            name, now = rows[0].ref.name, self._clock()
            last = self._proposed_at.get((caller.tenant, name, caller.key_id))
            if (last is None or now - last >= PAUSE_S) and self._has_room(caller.tenant):
                self._proposed_at.put((caller.tenant, name, caller.key_id), now)
                self._start(caller.tenant, "proposed", Feedback.proposed(text, name, caller.key_id))

    def _has_room(self, tenant: str) -> bool:
        if self._running[tenant] >= MAX_RUNNING - self._running.total():
            return False
        second = int(self._clock())
        last, num_noted = self._noted.get(tenant) or (second, 0)
        num_noted = num_noted + 1 if second == last else 1
        self._noted.put(tenant, (second, num_noted))
        return num_noted <= MAX_NOTED

    def _start(self, tenant: str, kind: Kind, feedback: Feedback) -> None:
        self._running[tenant] += 1
        self._background.start(self._write(tenant, kind, feedback), "noting a prompt")

    async def _write(self, tenant: str, kind: Kind, feedback: Feedback) -> None:
        try:
            await self._store.put_feedback(tenant, kind, feedback)
        finally:
            self._running -= Counter([tenant])  # forgets those without any


def _names_adapter(question: Question) -> bool:
    """Return whether `model` names an adapter, and no version of it."""
    return question.alias is None and question.lora.names_adapters is None and "@" not in question.model


def _find_text(question: Question) -> str | None:
    """Return the text by which the router would read the prompt, None for one that means nothing alone."""
    if isinstance(question.prompt, TokenIds) or not isinstance(question.prompt, tuple):
        text = question.text
    else:
        reading = choose_texts(question.prompt)
        text = None if reading.previous or reading.is_housekeeping else reading.texts[0]
    text = read_ends(text or "")
    return text if text.strip() else None
