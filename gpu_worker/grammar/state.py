"""How far an answer has come in its grammar, and the ids that may follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

BITS = 32


def num_words(vocabulary: int) -> int:
    """Return the words of one mask: a bit per id, the lowest first."""
    return -(-vocabulary // BITS)


class GrammarState:
    """The grammar of one row. It follows the row's own list of tokens, whose answer begins at `num_prompt_tokens`.

    `update` runs on another thread than the rest, never concurrently with it: see `MaskThread`.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokens: Sequence[int],
        num_prompt_tokens: int,
        vocabulary: int,
        when_slow: Callable[[], None] = lambda: None,
    ) -> None:
        """`when_slow` is called once if an update takes too long."""
        self._matcher, self._tokens, self._start = matcher, tokens, num_prompt_tokens
        self._num_consumed = 0
        self._mask_at = -1  # number of consumed tokens that `allowed` is valid for
        self.allowed: NDArray[np.uint32] = np.zeros(num_words(vocabulary), np.uint32)
        self.error: str | None = None
        self._when_slow = when_slow

    def give_up(self, error: str) -> None:
        """Fail because an update, which still runs, takes too long."""
        self.error = error
        self._when_slow()

    @property
    def is_current(self) -> bool:
        """Return whether `allowed` is for the token after the row's last one, or never will be."""
        return self.error is not None or self._mask_at == len(self._tokens) - self._start

    def update(self) -> None:
        """Consume the row's tokens that are new, and set `allowed` for the next one. Failures set `error`."""
        answer = self._tokens[self._start :]
        if self._num_consumed > len(answer):  # the row has lost tokens: follow the remaining ones again
            self._matcher.reset()
            self._num_consumed = 0
        is_valid = self._matcher.consume_tokens(list(answer[self._num_consumed :]))
        if is_valid:
            self._num_consumed = len(answer)
            self._matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if not is_valid or self._matcher.is_error() or not self.allowed.any():
            self.error = "it allows no further token, or it is too complex"
        self._mask_at = len(answer)
