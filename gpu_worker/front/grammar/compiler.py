"""Compile grammars off the engine's thread, and cache them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from gpu_worker.errors import EngineFull, GrammarInvalid
from gpu_worker.front.fair_threads import FairThreads
from gpu_worker.front.grammar.library import compile_matcher, finds_first_mask
from gpu_worker.front.grammar.state import GrammarState
from gpu_worker.front.request.grammar import Grammar
from lora_store.lru_cache import LruCache

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMARS = 64
MAX_PENDING = 64
MAX_REFUSED = 1024
MAX_PASSED = 4096
_NUM_THREADS = 2
_LONGEST_CHECK_S = 20.0  # the process limits its own CPU time; this is for a machine that gives it none
_TOO_COMPLEX = "it needs too much time or memory; make it simpler"
_TOO_SLOW = "an earlier answer failed because its next token needed too much time or memory; make it simpler"
_SLOW_FOR_S = 600.0  # how long a grammar that needed too much time or memory is refused


def _start() -> subprocess.Popen[str]:
    """Start a check. Raises: EngineFull if the machine has no room for another process."""
    command = [sys.executable, "-m", "gpu_worker.front.grammar.check"]
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    except OSError as exc:
        raise EngineFull(f"no process could be started to check the grammar ({exc.strerror}); retry later") from exc


class CheckProcess:
    """The process that checks one grammar. `kill` may be called from any thread, also before `run`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._is_killed = False

    def run(self, grammar: Grammar) -> None:
        """Return if the grammar is good. Raises: GrammarInvalid, EngineFull."""
        with self._lock:
            if self._is_killed:
                raise GrammarInvalid("the request was cancelled")
            self._process = _start()
        with self._process as process:
            try:
                output, _ = process.communicate(
                    json.dumps({"kind": grammar.kind, "text": grammar.text}), timeout=_LONGEST_CHECK_S
                )
            except subprocess.TimeoutExpired as exc:
                process.kill()
                raise EngineFull("the machine was too busy to check the grammar; retry later") from exc
        found = json.loads(output) if process.returncode == 0 and output else {"error": _TOO_COMPLEX, "pointer": ""}
        if found["error"] is not None:
            raise GrammarInvalid(found["error"], found["pointer"])

    def kill(self) -> None:
        """End the process, or do not start it."""
        with self._lock:
            self._is_killed = True
            if self._process is not None:
                self._process.kill()


@dataclass(slots=True)
class _Entry:
    """A grammar that is compiled or being compiled, and the number of requests that wait for it."""

    check: CheckProcess
    compiled: Future[LLMatcher] = field(init=False)
    num_waiting: int = 0
    is_abandoned: bool = False

    @property
    def has_failed(self) -> bool:
        return self.compiled.done() and (self.compiled.cancelled() or self.compiled.exception() is not None)


class GrammarCompiler:
    """A thread-safe cache of compiled grammars, by tenant. The oldest unused ones are dropped.

    The tenant is part of the key, because a fast answer would reveal another tenant's grammars. Concurrent requests
    with one grammar compile it once. When the last of them leaves, the check is killed.

    Tenants take turns and share the places for pending grammars, as in FairThreads.

    Grammars that passed their check are remembered, so that one whose entry was dropped is compiled again within
    milliseconds, without a process. A pool may have more schemas in contracts than there are entries.

    Refused grammars are remembered, so that a repeated one costs nothing: invalid ones until `max_refused` others came
    later, and those that needed too much time or memory, also while an answer was generated, for ten minutes.
    """

    def __init__(
        self,
        make_vocabulary: Callable[[], LLTokenizer],
        *,
        max_grammars: int = MAX_GRAMMARS,
        max_pending: int = MAX_PENDING,
        max_refused: int = MAX_REFUSED,
        clock: Callable[[], float] = time.monotonic,
        new_check: Callable[[], CheckProcess] = CheckProcess,
    ) -> None:
        """`make_vocabulary` is called before the first grammar is compiled, because it takes about a second."""
        self._make_vocabulary, self._new_check = make_vocabulary, new_check
        self._max_grammars, self._clock = max_grammars, clock
        self._vocabulary: LLTokenizer | None = None
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._refused: LruCache[bytes, tuple[float, GrammarInvalid]] = LruCache(max_refused)  # until when, and why
        self._passed: LruCache[bytes, bool] = LruCache(MAX_PASSED)
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._threads = FairThreads(
            "grammar-compiler",
            num_threads=_NUM_THREADS,
            max_calls=max_pending,
            full=f"{max_pending} grammars are waiting for the compiler; retry later",
        )

    async def compile(self, grammar: Grammar, tenant: str) -> None:
        """Return when the grammar is compiled. Leaving the call cancels a compilation without other waiters.

        Raises: GrammarInvalid, EngineFull.
        """
        key, entry = self._entry(grammar, tenant)
        try:
            await asyncio.shield(asyncio.wrap_future(entry.compiled))
        except GrammarInvalid as exc:
            raise GrammarInvalid(exc.message, exc.pointer, grammar.param) from None
        finally:
            self._leave(key, entry)

    def state(
        self, grammar: Grammar, tenant: str, tokens: Sequence[int], num_prompt_tokens: int, vocabulary: int
    ) -> GrammarState:
        """Return the grammar's state for a row. Wait for the compiler if needed. Raises: GrammarInvalid, EngineFull."""
        key, entry = self._entry(grammar, tenant)
        try:
            matcher = entry.compiled.result().deep_copy()
            slow = partial(self._refuse, key, entry, GrammarInvalid(_TOO_SLOW), _SLOW_FOR_S)
            renew = partial(self._renew, key, grammar, entry)
            return GrammarState(matcher, tokens, num_prompt_tokens, vocabulary, when_slow=slow, renew=renew)
        except GrammarInvalid as exc:
            raise GrammarInvalid(exc.message, exc.pointer, grammar.param) from None
        finally:
            self._leave(key, entry)

    def close(self) -> None:
        """Start no more compilations, and kill those that run."""
        self._threads.close()
        with self._lock:
            entries = list(self._entries.values())
        for entry in entries:
            entry.check.kill()

    @property
    def num_grammars(self) -> int:
        return len(self._entries)

    def _entry(self, grammar: Grammar, tenant: str) -> tuple[bytes, _Entry]:
        """Return the grammar's entry, for one more waiting request.

        Raises: EngineFull; GrammarInvalid for a grammar that was refused before.
        """
        key = _make_key(grammar, tenant)
        with self._lock:
            self._raise_if_refused(key, grammar.param)
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(self._new_check())
                entry.compiled = self._threads.submit(tenant, partial(self._compile, key, grammar, entry))
                self._entries[key] = entry
                self._drop_oldest()
            self._entries.move_to_end(key)
            entry.num_waiting += 1
            return key, entry

    def _drop_oldest(self) -> None:
        """Drop entries without waiting requests, oldest first, until there is room."""
        unused = [key for key, entry in self._entries.items() if not entry.num_waiting and entry.compiled.done()]
        for key in unused[: max(len(self._entries) - self._max_grammars, 0)]:
            del self._entries[key]

    def _leave(self, key: bytes, entry: _Entry) -> None:
        with self._lock:
            entry.num_waiting -= 1
            entry.is_abandoned = not entry.num_waiting and not entry.compiled.done()
            if entry.is_abandoned or entry.has_failed:  # another failure may not come again
                self._forget(key, entry)
        if entry.is_abandoned:
            entry.compiled.cancel()
            entry.check.kill()

    def _raise_if_refused(self, key: bytes, param: str) -> None:
        until, error = self._refused.get(key) or (0.0, None)
        if error is None:
            return
        if self._clock() < until:
            raise GrammarInvalid(error.message, error.pointer, param)
        self._refused.pop(key)

    def _refuse(self, key: bytes, entry: _Entry, error: GrammarInvalid, for_s: float) -> None:
        """Refuse the grammar for some time, unless all its requests have left, whose check was killed."""
        with self._lock:
            if entry.is_abandoned:
                return
            self._passed.pop(key)
            self._refused.put(key, (self._clock() + for_s, error))
            self._forget(key, entry)

    def _forget(self, key: bytes, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]

    def _compile(self, key: bytes, grammar: Grammar, entry: _Entry) -> LLMatcher:
        try:
            with self._lock:
                has_passed = self._passed.get(key)
            if not has_passed:
                entry.check.run(grammar)
            matcher = compile_matcher(grammar.kind, grammar.text, self._known_vocabulary())
            # Here the first mask delays no row but those of this grammar; in a step it would delay all.
            if not finds_first_mask(matcher):
                raise GrammarInvalid(_TOO_COMPLEX)
        except GrammarInvalid as exc:
            self._refuse(key, entry, exc, _SLOW_FOR_S if exc.message == _TOO_COMPLEX else math.inf)
            raise
        with self._lock:
            self._passed.put(key, True)
        return matcher

    def _renew(self, key: bytes, grammar: Grammar, entry: _Entry) -> LLMatcher:
        """Compile the grammar for one answer, after the answers of this entry have used up the lexer that they share.

        The entry is dropped, so that the next request compiles the grammar again.
        """
        with self._lock:
            self._forget(key, entry)
        return compile_matcher(grammar.kind, grammar.text, self._known_vocabulary())

    def _known_vocabulary(self) -> LLTokenizer:
        with self._vocabulary_lock:
            self._vocabulary = self._vocabulary or self._make_vocabulary()
            return self._vocabulary


def _make_key(grammar: Grammar, tenant: str) -> bytes:
    return hashlib.sha256(json.dumps([tenant, grammar.kind, grammar.text]).encode()).digest()
