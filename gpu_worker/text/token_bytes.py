"""The bytes a single token stands for. Text alone cannot tell: many tokens are a part of a character."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # sentencepiece's sign for a space


class TokenBytes:
    """Reads the two kinds of vocabulary in use: byte-level, and sentencepiece's with a token for each byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_of = _byte_alphabet() if "ByteLevel(" in repr(tokenizer.decoder) else None
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}

    def __call__(self, token_id: int) -> bytes:
        """b"" for an id that is padding of the model's output and no token."""
        if token_id in self._added:
            content: str = self._added[token_id]
            return content.encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in piece if character in self._byte_of)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 set it.

    Printable bytes of Latin-1 stand for themselves; the others take the characters from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
