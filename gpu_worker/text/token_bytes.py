"""Return the bytes of single tokens. Text is not enough, because many tokens are part of a character."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # sentencepiece's symbol for a space


class TokenBytes:
    """Bytes by token id, for byte-level vocabularies and for sentencepiece vocabularies with byte tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_of = _byte_alphabet() if "ByteLevel(" in repr(tokenizer.decoder) else None
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}

    def __call__(self, token_id: int) -> bytes:
        """Return the token's bytes, or b"" for an id that only pads the model's output."""
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
    """Return the byte of each character in GPT-2's byte-level alphabet.

    Printable Latin-1 bytes map to themselves; the others map to the characters from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
