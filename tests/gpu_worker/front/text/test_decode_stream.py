"""Text of ids one at a time, compared with the text of all at once, for the common kinds of tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from gpu_worker.front.text.decode_stream import DecodeStream, text_offsets
from gpu_worker.front.text.token_bytes import TokenBytes
from tests.tiny import byte_tokenizer

BYTE_LEVEL: Tokenizer = byte_tokenizer().backend_tokenizer
WORDS = ["▁", "▁Paris", "▁is", "The", "▁capital", "é", "a", ",", "\ufffd"]
NUM_SPECIAL = 2


def sentencepiece_like(*, strips: bool) -> Tokenizer:
    """Return a tokenizer of words, a token for each byte, and two special tokens.

    `strips`: remove the first space, as Llama-2's and Mistral's tokenizers do and Gemma's does not.
    """
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {piece: 256 + number for number, piece in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strips else [])])
    return tokenizer


LLAMA, GEMMA = sentencepiece_like(strips=True), sentencepiece_like(strips=False)
METASPACE = sentencepiece_like(strips=True)
METASPACE.decoder = decoders.Metaspace()
KINDS = pytest.mark.parametrize("tokenizer", [LLAMA, GEMMA, METASPACE], ids=["strips a space", "keeps it", "metaspace"])
BOS = LLAMA.token_to_id("<s>")


def ids_of(*pieces: str, tokenizer: Tokenizer = LLAMA) -> list[int]:
    """Return each piece's own id, or those of its bytes."""
    found: list[int] = []
    for piece in pieces:
        own = tokenizer.token_to_id(piece)
        found += list(piece.encode()) if own is None else [own]
    return found


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    """Return the text of each id, then the text at the end."""
    detokenizer = DecodeStream(tokenizer, prompt)
    return [*[detokenizer.push(token) for token in answer], detokenizer.finish()]


def behind(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """Return the text that the answer adds to the prompt, both decoded at once."""
    before: str = tokenizer.decode(list(prompt), skip_special_tokens=True)
    after: str = tokenizer.decode([*prompt, *answer], skip_special_tokens=True)
    assert after.startswith(before)
    return after[len(before) :]


PROMPT = [BOS, *ids_of("The", "▁capital", "▁is")]


@KINDS
def test_the_first_space_of_an_answer_is_kept(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, PROMPT, ids_of("▁Paris", ",", "▁is")) == [" Paris", ",", " is", ""]
    answer = ids_of("▁Paris", "▁is")
    assert "".join(streamed(tokenizer, [BOS], answer)) == behind(tokenizer, [BOS], answer), "there is no text before it"


@KINDS
@pytest.mark.parametrize("num_special", [1, 7, 8, 30])
def test_special_tokens_at_the_end_of_a_prompt_do_not_hide_its_text(num_special: int, tokenizer: Tokenizer) -> None:
    prompt = [*PROMPT, *[BOS] * num_special]
    assert streamed(tokenizer, prompt, ids_of("▁Paris")) == [" Paris", ""]


@KINDS
def test_special_tokens_and_padding_have_no_text_and_hide_no_space(tokenizer: Tokenizer) -> None:
    padding = tokenizer.get_vocab_size() + 5
    answer = [*ids_of("▁Paris"), BOS, padding, *[BOS] * 20, *ids_of("▁is")]
    pieces = streamed(tokenizer, PROMPT, answer)
    assert pieces[0] == " Paris" and pieces[-2:] == [" is", ""] and not any(pieces[1:-2])


@KINDS
def test_broken_bytes_are_released_eventually_and_the_space_after_them_is_kept(tokenizer: Tokenizer) -> None:
    pieces = streamed(tokenizer, PROMPT, [0xA9, *ids_of("▁Paris")])
    if tokenizer is not METASPACE:  # the id has no bytes
        assert "".join(pieces) == "\ufffd Paris"
        stream = DecodeStream(tokenizer, PROMPT)
        released = "".join([stream.push(0xA9) for _ in range(50)])
        assert (released, stream.finish()) == ("\ufffd" * 47, "\ufffd" * 3)


UNITS = st.sampled_from(
    [[id_] for id_ in range(256, 256 + len(WORDS) + NUM_SPECIAL)] + [list("é漢🙂"[i].encode()) for i in range(3)]
)


@pytest.mark.parametrize("tokenizer", [LLAMA, GEMMA], ids=["strips a space", "keeps it"])
@given(prompt=st.lists(UNITS, min_size=1, max_size=12), answer=st.lists(UNITS, max_size=12))
def test_the_pieces_join_to_the_text_of_all_ids(
    tokenizer: Tokenizer, prompt: list[list[int]], answer: list[list[int]]
) -> None:
    before, after = [id_ for unit in prompt for id_ in unit], [id_ for unit in answer for id_ in unit]
    if tokenizer.decode(before, skip_special_tokens=True):
        assert "".join(streamed(tokenizer, before, after)) == behind(tokenizer, before, after)


@given(answer=st.lists(st.sampled_from([0x41, 0xA9, 0xC3, 0xE6, 0xBC, 0xA2, 0xF0, 0x9F, 0x99, 0x82]), max_size=14))
def test_any_bytes_of_a_byte_level_vocabulary_join_to_the_text_of_all(answer: list[int]) -> None:
    token_bytes = TokenBytes(BYTE_LEVEL)
    id_of = {token_bytes(token): token for token in range(256)}
    ids = [id_of[bytes([byte])] for byte in answer]
    prompt = BYTE_LEVEL.encode("go").ids
    assert "".join(streamed(BYTE_LEVEL, prompt, ids)) == bytes(answer).decode(errors="replace")


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, GEMMA, METASPACE])
@given(answer=st.lists(st.integers(0, 299), max_size=12))
def test_no_ids_break_the_stream(tokenizer: Tokenizer, answer: list[int]) -> None:
    assert all(isinstance(piece, str) for piece in streamed(tokenizer, PROMPT, answer))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_an_incomplete_character_at_the_end_is_decoded_as_by_the_decoder(kept: int) -> None:
    bytes_ = list("🙂".encode())[:kept]
    answer = [*ids_of("▁Paris"), *bytes_]
    pieces = streamed(LLAMA, PROMPT, answer)
    assert pieces == [" Paris", *[""] * kept, "\ufffd" * kept] and "".join(pieces) == behind(LLAMA, PROMPT, answer)
    tokens = BYTE_LEVEL.encode("a🙂", add_special_tokens=False).ids[: 1 + kept]
    assert streamed(BYTE_LEVEL, [256], tokens) == ["a", *[""] * kept, "\ufffd"]


def test_a_character_appears_with_its_last_byte_after_a_prompt_of_bytes() -> None:
    """The prompt ids that are read may begin within a character."""
    prompt = list("🙂🙂🙂🙂".encode())
    for length in (4, 8, 12, 16):
        assert "".join(streamed(LLAMA, [BOS, *prompt[:length]], list("漢".encode()))) == "漢"
    shifted = [*prompt, *list("é".encode())]
    assert streamed(LLAMA, [BOS, *shifted], list("漢".encode())) == ["", "", "漢", ""]


class CountingTokenizer:
    """A tokenizer that counts its decoder calls and the ids they read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_calls = self.num_ids = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.num_calls += 1
        self.num_ids += len(ids)
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


@pytest.mark.parametrize(
    ("tokenizer", "prompt"),
    [
        (LLAMA, ids_of("\ufffd") * 2000),
        (LLAMA, [0xA9] * 2000),
        (BYTE_LEVEL, BYTE_LEVEL.encode("\ufffd" * 2000).ids),
        (BYTE_LEVEL, BYTE_LEVEL.encode("é").ids[:1] * 2000),
        (LLAMA, [BOS] * 20_000),
        (LLAMA, [*ids_of("\ufffd") * 2000, *[BOS] * 20_000]),
    ],
    ids=[
        "U+FFFD",
        "broken bytes",
        "U+FFFD in bytes",
        "bytes that begin a character",
        "special",
        "special behind U+FFFD",
    ],
)
def test_the_end_of_any_prompt_is_found_in_a_few_decoder_calls(tokenizer: Tokenizer, prompt: list[int]) -> None:
    counting = CountingTokenizer(tokenizer)
    DecodeStream(cast(Tokenizer, counting), prompt)
    assert counting.num_calls <= 16 and counting.num_ids <= 10_000


@KINDS
def test_a_visible_special_token_has_a_text_between_those_of_its_neighbours(tokenizer: Tokenizer) -> None:
    special = tokenizer.token_to_id("</s>")
    hidden = tokenizer.token_to_id("<s>")
    stream = DecodeStream(tokenizer, ids_of("The", tokenizer=tokenizer), {special: "[CALL]"})
    answer = [*ids_of("▁Paris", tokenizer=tokenizer), 0xC3, special, hidden, *ids_of("▁is", tokenizer=tokenizer)]
    incomplete = tokenizer.decode([0xC3])
    assert "".join([*map(stream.push, answer), stream.finish()]) == f" Paris{incomplete}[CALL] is"


@KINDS
def test_the_offset_of_an_id_is_the_length_of_the_text_before_it(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(piece) for piece in ("<s>", "▁Paris", "▁is", "é", "a", "</s>", ",")]
    offsets = text_offsets(tokenizer, ids)
    assert offsets == [len(tokenizer.decode(ids[:place])) for place in range(len(ids))]
    if tokenizer is not METASPACE:  # its ids have no bytes
        halves = [0xC3, 0xA9, 0x61]  # the two bytes of é, and a
        assert text_offsets(tokenizer, halves) == [0, 0, 1]
