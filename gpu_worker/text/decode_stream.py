"""Text of token ids one at a time, equal to the text of all of them at once.

A decoder looks at more than one id: sentencepiece's strips the first space of what it decodes, and a character may be
spread over four ids. So ids are decoded behind a few that came before them, and what those alone give is taken off:

    text of a new id = decode(context + pending + [id]) - decode(context)

Pending are ids whose text may still change. The context of the first ids is the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders return for invalid or unfinished characters
_MOST_UNFINISHED = 3  # ids: a character has at most four bytes
_PROMPT_IDS = 8  # at least so many of the prompt's last ids are the first context
_MOST_PROMPT_IDS = 1024  # at most so many, but for an unfinished character, where they have no text


class DecodeStream:
    """The text of one answer, behind its prompt. Special tokens have none."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = self._end_of(prompt_ids)
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this id."""
        self._pending.append(token_id)
        text = self._text_of(self._pending)
        if text.endswith(_REPLACEMENT):
            return self._broken(text)
        if text:
            return self._release(len(self._pending), text)
        if self._is_silent(token_id):
            self._pending.pop()
        return ""

    def finish(self) -> str:
        """Return the text of what is pending, with U+FFFD for invalid bytes."""
        return self._release(len(self._pending), self._text_of(self._pending))

    def _broken(self, text: str) -> str:
        """Return the part of the text that no further id can change: the last ids may begin a character."""
        count = len(self._pending) - _MOST_UNFINISHED
        released = self._text_of(self._pending[:count]) if count > 0 else ""
        return self._release(count, released) if released and text.startswith(released) else ""

    def _release(self, count: int, text: str) -> str:
        """Return the text. Its ids, the first `count` pending ones, are the context of the next."""
        if count:
            self._context, self._pending = self._pending[:count], self._pending[count:]
            self._context_text = self._decode(self._context)
        return text

    def _text_of(self, ids: list[int]) -> str:
        """Return the text that ids add to the context."""
        text = self._decode(self._context + ids)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(ids)  # invalid bytes that changed the text before them: no space is at stake

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _is_silent(self, token_id: int) -> bool:
        """Return whether the id never has any text: it is special, or padding of the model's output."""
        piece = self._tokenizer.id_to_token(token_id)
        return piece is None or (not self._decode([token_id]) and bool(self._tokenizer.decode([token_id], False)))

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the prompt's last ids: a few more where these have no text, or begin within a character.

        The number of decoder calls does not depend on the prompt. A prompt may end with any number of silent ids and of
        U+FFFD: so the search is bounded, and where it finds nothing better the ids begin where it began.
        """
        count = _PROMPT_IDS
        while count < min(len(prompt_ids), _MOST_PROMPT_IDS) and not self._decode(prompt_ids[-count:]):
            count *= 2
        for longer in range(count, count + _MOST_UNFINISHED + 1):
            if not self._decode(prompt_ids[-longer:]).startswith(_REPLACEMENT):
                return list(prompt_ids[-longer:])
        return list(prompt_ids[-count:])
