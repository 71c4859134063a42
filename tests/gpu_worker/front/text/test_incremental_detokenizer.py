"""Streamed text, compared with the whole text cut at its earliest stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gpu_worker.front.text.incremental_detokenizer import IncrementalDetokenizer
from tests.tiny import byte_tokenizer

BYTES: Tokenizer = byte_tokenizer().backend_tokenizer
ALPHABET = st.sampled_from("ab\n#é漢🙂")


def tokens_of(text: str) -> list[int]:
    ids: list[int] = BYTES.encode(text, add_special_tokens=False).ids
    return ids


def deltas(tokens: Sequence[int], stops: Sequence[str]) -> tuple[list[str], bool]:
    """Return the text released by each token, then at the end; and whether a stop string ended it."""
    stream = IncrementalDetokenizer(BYTES, stops)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], False


def cut(text: str, stops: Sequence[str]) -> str:
    """Return everything before the stop string that is completed first, and starts first among those."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(text=st.text(ALPHABET, max_size=24), stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
def test_deltas_join_to_the_text_cut_at_the_earliest_stop(text: str, stops: list[str]) -> None:
    pieces, stopped = deltas(tokens_of(text), stops)
    assert "".join(pieces) == cut(text, stops)
    assert stopped == any(stop in text for stop in stops)


@given(text=st.text(ALPHABET, max_size=24), stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
def test_only_a_possible_beginning_of_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    stream, released, seen = IncrementalDetokenizer(BYTES, stops), "", ""
    for character in text:
        for token in tokens_of(character):
            released += stream.push(token)
        seen += character
        if stream.stopped:
            return
        held = seen[len(released) :]
        assert seen.startswith(released)
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("tokens", "stops", "pieces"),
    [
        (tokens_of("a##b"), ["###"], ["a", "", "", "##b", ""]),
        (tokens_of("a##"), ["###"], ["a", "", "", "##"]),
        (tokens_of("é🙂"), [], ["", "é", "", "", "", "🙂", ""]),
        (tokens_of("é🙂")[:-1], ["#"], ["", "é", "", "", "", "\ufffd"]),
        ([*tokens_of("a"), 256, 258, *tokens_of("b")], [], ["a", "", "", "b", ""]),
    ],
    ids=["a false start", "an unfinished stop", "bytes of a character", "an incomplete one", "special tokens"],
)
def test_text_is_released_as_soon_as_it_is_certain(tokens: list[int], stops: list[str], pieces: list[str]) -> None:
    assert deltas(tokens, stops) == (pieces, False)


def test_nothing_follows_a_stop_string_not_even_unfinished_bytes() -> None:
    stream = IncrementalDetokenizer(BYTES, ["#"])
    assert [stream.push(token) for token in tokens_of("a#🙂")[:-1]] == ["a", "", "", "", ""]
    assert stream.stopped and stream.finish() == ""


def test_stops_before_min_tokens_are_shown_and_later_ones_end_it() -> None:
    stream = IncrementalDetokenizer(BYTES, ["#"])
    early = [stream.push(token, may_stop=False) for token in tokens_of("a#")]
    assert early == ["a", "#"] and not stream.stopped
    late = [stream.push(token) for token in tokens_of("b#")]
    assert late == ["b", ""] and stream.stopped
    assert stream.push(tokens_of("c")[0]) == stream.finish() == ""
