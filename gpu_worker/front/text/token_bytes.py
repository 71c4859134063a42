"""Return the bytes of single tokens. Text is not enough, because many tokens are part of a character."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*>")  # some vocabularies have HTML tags as tokens
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
            return (content if self._byte_of is not None else content.replace(_SPACE, " ")).encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in piece if character in self._byte_of)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(_SPACE, " ").encode()


def marker_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens that mark something for the model and are never text, by id.

    Besides those that the tokenizer calls special, these are tokens such as `<start_of_image>` or `<|fim_prefix|>` that
    were added to the vocabulary, or that the tokenizer never writes for their own text. Converted tokenizers often lack
    the flag. Added white space and HTML tags are text.
    """
    added = tokenizer.get_added_tokens_decoder()
    special = {token_id: token.content for token_id, token in added.items() if token.special}
    shaped = {
        token_id: piece
        for piece, token_id in tokenizer.get_vocab().items()
        if _MARKER.fullmatch(piece) and not _TAG.fullmatch(piece) and not _BYTE_PIECE.fullmatch(piece)
    }
    return special | {
        token_id: piece
        for token_id, piece in shaped.items()
        if token_id in added or tokenizer.encode(piece, add_special_tokens=False).ids != [token_id]
    }


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in GPT-2's byte-level alphabet.

    Printable Latin-1 bytes map to themselves; the others map to the characters from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
