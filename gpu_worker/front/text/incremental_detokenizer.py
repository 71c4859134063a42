"""Convert token ids to text incrementally, and find stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from gpu_worker.front.text.decode_stream import DecodeStream


class IncrementalDetokenizer:
    """The text of one answer. Final text is released; text that might begin a stop string is held back.

    The text of the answer is what its ids add to the text of `prompt_ids`. `visible`: special tokens with a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        prompt_ids: Sequence[int] = (),
        visible: Mapping[int, str] = {},
    ) -> None:
        self._decoder = DecodeStream(tokenizer, prompt_ids, visible)
        self._stops = tuple(stops)
        self._held = ""
        self.num_released = 0  # characters
        self.stop: str | None = None  # the stop string that ended the answer

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self.stop is not None

    @property
    def num_chars(self) -> int:
        """Return the number of characters so far, including held-back ones."""
        return self.num_released + len(self._held)

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Return the text that this token releases. After a stop string, `stopped` is true and no more text follows.

        Text pushed while `may_stop` is false (before min_tokens) is not searched for stop strings.
        """
        piece = self._decoder.push(token_id)
        if self.stopped or not piece:
            return ""
        self._held += piece
        if not may_stop:
            return self._release(len(self._held))
        found = [(index, stop) for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            index, self.stop = min(found)
            released = self._release(index)
            self._held = ""
            return released
        return self._release(len(self._held) - self._longest_stop_prefix())

    def finish(self) -> str:
        """Return the held-back text after the last token. Bytes of an incomplete character become U+FFFD."""
        if not self.stopped:
            self._held += self._decoder.finish()
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self.num_released += count
        return released

    def _longest_stop_prefix(self) -> int:
        """Return the number of characters at the end of the held text that might begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
