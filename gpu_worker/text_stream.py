"""Turns a row's token ids into text as they come, and finds its stop strings."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

logger = logging.getLogger(__name__)


class TextStream:
    """Text that can no longer change is released; what might begin a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stops)
        self._held = ""
        self.num_released = 0  # characters
        self.stopped = False

    @property
    def num_chars(self) -> int:
        """Characters so far, with those that are held back."""
        return self.num_released + len(self._held)

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text this token releases. After a stop string, `stopped` is true and nothing more comes.

        Text pushed while `may_stop` is false (before min_tokens) is not searched.
        """
        piece = self._decode(token_id)
        if self.stopped or not piece:
            return ""
        self._held += piece
        if not may_stop:
            return self.flush()
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released = self._release(min(found))
            self._held = ""
            return released
        return self._release(len(self._held) - self._longest_stop_prefix())

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self.num_released += count
        return released

    def _decode(self, token_id: int) -> str | None:
        """The decoder's next piece. Bytes that are no text end its patience (tokenizers 0.23); a new one goes on."""
        try:
            return self._decoder.step(self._tokenizer, token_id)
        except Exception as exc:  # tokenizers raises no narrower class
            logger.debug("token %d does not follow from the ones before: %s", token_id, exc)
            self._decoder = DecodeStream(skip_special_tokens=True)
            return self._decoder.step(self._tokenizer, token_id)

    def _longest_stop_prefix(self) -> int:
        """Characters at the end of the held text that might be the start of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
