"""How far an answer has come in its grammar, the ids that may follow, and runs of ids that must."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpu_worker.front.grammar.library import finds_first_mask

if TYPE_CHECKING:
    from llguidance import LLMatcher

BITS = 32
LONGEST_RUN = 8  # ids that are known to follow; the search costs a mask for each
# The CPU time that the masks of an answer may take, and what each of its tokens adds. Other rows wait meanwhile.
_FREE_S, _TOKEN_S = 0.25, 0.01
_GAVE_UP = "it allows no further token, or it is too complex"
Mask = NDArray[np.uint32]
"""A bit for each id, the lowest first."""


def only_id(mask: Mask) -> int | None:
    """Return the id of a mask that allows one."""
    words = np.flatnonzero(mask)
    if len(words) != 1 or int(mask[words[0]]).bit_count() != 1:
        return None
    return int(words[0]) * BITS + int(mask[words[0]]).bit_length() - 1


def num_words(vocabulary: int) -> int:
    """Return the words of one mask: a bit per id, the lowest first."""
    return -(-vocabulary // BITS)


class GrammarState:
    """The grammar of one row. It follows the row's own list of tokens, whose answer begins at `num_prompt_tokens`.

    Where the masks allow one id only, several times in a row, these ids are a run. Its tokens need no choice, so a step
    computes several of them at once: the engine takes them from `following`, and sets `run`.
    `update` runs on another thread than the rest, never concurrently with it: see `MaskThread`.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokens: Sequence[int],
        num_prompt_tokens: int,
        vocabulary: int,
        when_slow: Callable[[], None] = lambda: None,
        renew: Callable[[], LLMatcher] | None = None,
    ) -> None:
        """`when_slow` is called if updates take too much processor time or the library gives up.

        `renew` compiles the grammar again. Copies of a matcher share a lexer, whose states are limited. When the
        answers with copies of `matcher` have used them up, this one goes on with a matcher that it does not share.
        `allowed`: the mask for the token behind the row's last one and `run`.
        """
        self._fresh, self._matcher = matcher, matcher.deep_copy()
        self._tokens, self._start = tokens, num_prompt_tokens
        self._num_consumed = 0
        self._mask_at = -1  # number of consumed tokens that `allowed` is valid for
        self.longest_run = LONGEST_RUN  # 0: no runs
        self.run: list[int] = []  # certain tokens behind the row's last one, which the next step computes
        self._following: list[int] = []  # those behind `_mask_at` tokens
        self.allowed: Mask = np.zeros(num_words(vocabulary), np.uint32)
        self.error: str | None = None
        self._when_slow, self._renew = when_slow, renew
        self._spent_s = 0.0  # CPU time of the updates that have ended
        self._running: tuple[int, float] | None = None  # of an update: its thread's CPU clock, and when it began

    def give_up(self, error: str) -> None:
        """Fail because updates take too long. One may still run.

        The grammar is slow only if they took CPU time: a delay of the machine does not make it slow.
        """
        self.error = error
        if self._is_slow():
            self._when_slow()

    def check_end(self) -> None:
        """Fail if the row's last token ends the answer before the grammar does.

        For an engine whose masks are not of this object: where its library gives up, it allows no other token.
        """
        answer = self._tokens[self._start :]
        matcher = self._fresh.deep_copy()
        num_allowed = matcher.try_consume_tokens(answer)
        if num_allowed < len(answer) and self._renew_exhausted():
            matcher = self._fresh.deep_copy()
            num_allowed = matcher.try_consume_tokens(answer)
        if num_allowed == len(answer) - 1 and not matcher.is_accepting():
            self.fail()

    def fail(self) -> None:
        """Fail because the library gave up."""
        self.error = _GAVE_UP
        self._when_slow()

    def _is_slow(self) -> bool:
        """Return whether the updates, also one that runs, took more CPU time than those of such an answer may."""
        spent_s, running = self._spent_s, self._running
        if running is not None:
            clock, began = running
            spent_s += time.clock_gettime(clock) - began
        return spent_s > _FREE_S + _TOKEN_S * (len(self._tokens) - self._start + len(self.run))

    @property
    def is_current(self) -> bool:
        """Return whether `allowed` is for the token after the row's last one and the run, or never will be."""
        return self.error is not None or self._mask_at == len(self._tokens) - self._start + len(self.run)

    def following(self, most: int) -> list[int]:
        """Return up to `most` tokens that must follow the row's last one, as far as they are known."""
        known = len(self._tokens) - self._start - self._mask_at
        return self._following[known : known + most] if self._mask_at >= 0 and known > 0 else []

    def mask(self, ahead: int) -> Mask:
        """Return the ids that may follow the first `ahead` tokens of the run."""
        if ahead == len(self.run):
            return self.allowed
        mask = np.zeros_like(self.allowed)
        mask[self.run[ahead] // BITS] = 1 << self.run[ahead] % BITS
        return mask

    def update(self) -> None:
        """Consume the row's new tokens and the run, and set `allowed` for the next one. Failures set `error`."""
        began = time.thread_time()
        self._running = time.pthread_getcpuclockid(threading.get_ident()), began
        answer = [*self._tokens[self._start :], *self.run]
        if self._num_consumed > len(answer):  # the row has lost tokens: follow the remaining ones again
            self._begin_again()
        is_followed = self._follow(answer) or (self._renew_exhausted() and self._follow(answer))
        if not is_followed or not self.allowed.any():
            self.error = _GAVE_UP
            if self._matcher.is_error():
                self._when_slow()
        self._following = [] if self.error is not None else self._find_run()
        self._running = None
        self._spent_s += time.thread_time() - began
        if self.error is None and self._is_slow():
            self.give_up("it takes too long to find the tokens that may follow")
        self._mask_at = len(answer)

    def _follow(self, answer: Sequence[int]) -> bool:
        """Consume the answer's new tokens and set `allowed` for the next one. Return whether the library could."""
        if not self._matcher.consume_tokens(answer[self._num_consumed :]):
            return False
        self._num_consumed = len(answer)
        self._matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        return not self._matcher.is_error()

    def _renew_exhausted(self) -> bool:
        """Take a matcher of this answer's own if others may have used up the lexer. Return whether it was taken."""
        if self._renew is None or finds_first_mask(self._fresh):
            return False
        self._fresh, self._renew = self._renew(), None
        self._begin_again()
        return True

    def _begin_again(self) -> None:
        self._matcher = self._fresh.deep_copy()
        self._num_consumed = 0

    def _find_run(self) -> list[int]:
        """Return the ids that must follow, without those that end the answer.

        A copy of the matcher consumes them, because not every grammar can be rolled back.
        """
        run, mask, ahead = list[int](), self.allowed, None
        while len(run) < self.longest_run and (token := only_id(mask)) is not None:
            ahead = ahead or self._matcher.deep_copy()
            if ahead.is_accepting() or not ahead.consume_token(token):
                break
            run.append(token)
            mask = np.zeros_like(mask)
            ahead.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return run
