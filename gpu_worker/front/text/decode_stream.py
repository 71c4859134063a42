"""Decode token ids one at a time, with the same text as decoding all of them at once.

Decoders look at more than one id: sentencepiece strips the first space of its input, and a character may be spread over
four ids. So new ids are decoded after a few earlier ones, and the text of those is removed:

    text of a new id = decode(context + pending + [id]) - decode(context)

Pending ids are those whose text may still change. The first context is the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # decoders return it for invalid or incomplete characters
_MOST_UNFINISHED = 3  # ids: a character has at most four bytes
_PROMPT_IDS = 8  # minimum number of prompt ids in the first context
_MOST_PROMPT_IDS = 1024  # maximum, if the last ids have no text


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return for each id the number of characters that those before it add to the text. Special tokens add none."""
    stream, offsets, num_chars = DecodeStream(tokenizer, ()), list[int](), 0
    for token_id in ids:
        offsets.append(num_chars)
        num_chars += len(stream.push(token_id))
    return offsets


class DecodeStream:
    """The incremental decoder of one answer. Special tokens have no text, except for those of `visible`, by id."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], visible: Mapping[int, str] = {}) -> None:
        self._tokenizer, self._visible = tokenizer, visible
        self._context = self._find_end(prompt_ids)
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Add an id and return the text that has become final."""
        if token_id in self._visible:
            return self.finish() + self._visible[token_id]
        self._pending.append(token_id)
        text = self._decode_text(self._pending)
        if text.endswith(_REPLACEMENT):
            return self._release_final_part(text)
        if text:
            return self._release(len(self._pending), text)
        if self._is_silent(token_id):
            self._pending.pop()
        return ""

    def finish(self) -> str:
        """Return the text of the pending ids, with U+FFFD for invalid bytes."""
        return self._release(len(self._pending), self._decode_text(self._pending))

    def _release_final_part(self, text: str) -> str:
        """Return the part of the text that no further id can change. The last ids may begin a character."""
        count = len(self._pending) - _MOST_UNFINISHED
        released = self._decode_text(self._pending[:count]) if count > 0 else ""
        return self._release(count, released) if released and text.startswith(released) else ""

    def _release(self, count: int, text: str) -> str:
        """Return `text` and make its ids, the first `count` pending ones, the new context."""
        if count:
            self._context, self._pending = self._pending[:count], self._pending[count:]
            self._context_text = self._decode(self._context)
        return text

    def _decode_text(self, ids: list[int]) -> str:
        """Return the text that `ids` add to the context."""
        text = self._decode(self._context + ids)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(ids)  # invalid bytes changed earlier text; no leading space can be lost

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _is_silent(self, token_id: int) -> bool:
        """Return whether the id never has text: a special token, or padding of the model's output."""
        piece = self._tokenizer.id_to_token(token_id)
        return piece is None or (not self._decode([token_id]) and bool(self._tokenizer.decode([token_id], False)))

    def _find_end(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the prompt's last ids, extended if they have no text or begin within a character.

        The search is bounded, because a prompt may end with any number of ids without text or of U+FFFD. If it finds no
        better start, the ids begin at the initial position.
        """
        count = _PROMPT_IDS
        while count < min(len(prompt_ids), _MOST_PROMPT_IDS) and not self._decode(prompt_ids[-count:]):
            count *= 2
        for longer in range(count, count + _MOST_UNFINISHED + 1):
            if not self._decode(prompt_ids[-longer:]).startswith(_REPLACEMENT):
                return list(prompt_ids[-longer:])
        return list(prompt_ids[-count:])
