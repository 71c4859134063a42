"""Compute the masks of a step on another thread, while the engine computes the logits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from gpu_worker.front.grammar.state import GrammarState

logger = logging.getLogger(__name__)

LONGEST_MASK_S = 2.0


class MaskThread:
    """The thread that updates the grammars of the rows that get a token in this step.

    A grammar that needs longer than `longest_s` for one mask fails. Its thread is abandoned, because the library cannot
    be interrupted, and another one updates the other grammars.
    """

    def __init__(self, longest_s: float = LONGEST_MASK_S) -> None:
        self._longest_s = longest_s
        self._executor: ThreadPoolExecutor | None = None  # none before the first grammar
        self._states: Sequence[GrammarState] = ()
        self._job: Future[None] | None = None
        self._abandoned = threading.Event()

    def begin(self, states: Sequence[GrammarState]) -> None:
        """Start updating these grammars. They must not change before `finish` has returned."""
        self.finish()
        if states:
            self._states = states
            self._submit()

    def finish(self) -> None:
        """Return when the grammars of the last `begin` are updated or have failed."""
        while self._job is not None:
            slow = self._first_pending()
            try:
                self._job.result(self._longest_s)
                self._job = None
            except FutureTimeout:
                if slow is not None and slow is self._first_pending():
                    self._give_up(slow)
        self._states = ()

    def close(self) -> None:
        """End the thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        self._executor = self._executor or ThreadPoolExecutor(1, "grammar")
        self._job = self._executor.submit(_update, self._states, self._abandoned)

    def _first_pending(self) -> GrammarState | None:
        return next((state for state in self._states if not state.is_current), None)

    def _give_up(self, slow: GrammarState) -> None:
        """Fail this grammar, and update the others on a new thread."""
        slow.give_up(f"it took more than {self._longest_s:g} s to find the tokens that may follow")
        self._abandoned.set()
        self.close()
        self._executor, self._abandoned = None, threading.Event()
        self._submit()


def _update(states: Sequence[GrammarState], abandoned: threading.Event) -> None:
    for state in states:
        if abandoned.is_set():
            return
        if not state.is_current:
            try:
                state.update()
            except BaseException:  # a panic of the library is no Exception
                logger.exception("a grammar cannot be followed")
                state.give_up("the grammar library failed")
