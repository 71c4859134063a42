"""The bytes of tokens, for both kinds of vocabulary."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gpu_worker.front.text.token_bytes import TokenBytes, marker_tokens
from tests.tiny import byte_tokenizer


def test_every_byte_of_a_byte_level_vocabulary_is_itself() -> None:
    tokenizer = byte_tokenizer().backend_tokenizer
    token_bytes = TokenBytes(tokenizer)
    alphabet = {
        character: token_bytes(tokenizer.token_to_id(character)) for character in pre_tokenizers.ByteLevel.alphabet()
    }
    assert sorted(alphabet.values()) == [bytes([byte]) for byte in range(256)]
    for text in ("plain", " space\n", "né🙂漢", "\x00\x7f\xad"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(map(token_bytes, ids)).decode() == text


def test_pieces_of_a_sentencepiece_vocabulary_are_their_text() -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {piece: 256 + place for place, piece in enumerate(["▁", "a", "▁the", "é"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])  # as Gemma's tokenizers have runs of spaces
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes(i) for i in (0xE4, 256, 257, 258, 259)] == [b"\xe4", b" ", b"a", b" the", "é".encode()]
    assert token_bytes(tokenizer.token_to_id("<end>")) == b"<end>"
    spaces = tokenizer.token_to_id("▁▁")
    assert token_bytes(spaces) == tokenizer.decode([spaces, spaces]).encode()[:2] == b"  "


@pytest.mark.parametrize("token_id", [259, 299, 10**6])
def test_padding_of_the_models_output_has_no_bytes(token_id: int) -> None:
    assert TokenBytes(byte_tokenizer().backend_tokenizer)(token_id) == b""


def test_markers_are_never_text_whether_they_are_called_special_or_not() -> None:
    pieces = [*"<>[]_abcdefghijklmnopqrstuvwxyz.", "<0x41>", "<start_of_image>", "..", "[..", "[..]"]
    merges = [(".", "."), ("[", ".."), ("[..", "]")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.add_tokens(["[multimodal]", "<|fim_prefix|>", "</tool_call>", "<table>", "</h1>", "\n\n", "word"])
    markers = ["</tool_call>", "<end>", "<start_of_image>", "<|fim_prefix|>", "[multimodal]"]
    found = marker_tokens(tokenizer)
    assert sorted(found.values()) == markers
    assert all(tokenizer.id_to_token(token_id) == marker for token_id, marker in found.items())
