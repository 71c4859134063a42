"""The text that a row releases with its tokens, and the inputs of its next token."""

from __future__ import annotations

import pytest

from gpu_worker.front.logprobs import Scored
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import Delta, SamplingParams
from gpu_worker.front.request.tool_parser import ToolCallParser
from gpu_worker.front.request.tools import HERMES
from gpu_worker.front.row import LONGEST_REPEATED, Row
from tests.gpu_worker.rows import BYTES, queued_row, row_of

END = 257


def answering(*, stops: tuple[str, ...] = (), max_new: int = 20, **params: int) -> Row:
    """Return a row with log probabilities that ends at END."""
    sampling = SamplingParams(max_tokens=max_new, logprobs=0, **params)  # type: ignore[arg-type]
    return row_of(stops=stops, sampling=sampling, max_new_tokens=max_new, end_ids=frozenset({END}))


def taken(row: Row, text: str, *, end: int | None = None) -> list[Delta]:
    """Return the deltas of these bytes, one token each, and of the id that ends them."""
    tokens = BYTES.encode(text, add_special_tokens=False).ids + ([] if end is None else [end])
    deltas = []
    for token in tokens:
        delta = row.append_token(token, Scored(-1.0, ()))
        deltas += [] if delta is None else [delta]
        if delta is not None and delta.finish_reason:
            break
    return deltas


def test_tokens_join_to_the_text_and_have_its_offsets() -> None:
    deltas = taken(answering(), "né🙂", end=END)
    *entries, end = [entry for delta in deltas for entry in delta.logprobs]
    assert b"".join(entry.token for entry in entries).decode() == "né🙂" == "".join(delta.text for delta in deltas)
    assert [entry.text_offset for entry in entries] == [0, 1, 1, 2, 2, 2, 2]
    assert not any(entry.is_end for entry in entries) and end.is_end
    assert [len(delta.logprobs) for delta in deltas] == [1, 2, 4, 1], (
        "each token is reported with the text that it completes"
    )


def test_tokens_held_back_for_a_stop_string_are_reported_unless_it_removes_them() -> None:
    deltas = taken(answering(stops=("##",)), "a#b##c")
    assert "".join(delta.text for delta in deltas) == "a#b"
    assert b"".join(entry.token for delta in deltas for entry in delta.logprobs) == b"a#b"
    deltas = taken(answering(stops=("abX",)), "aabX")
    assert [(delta.text, [entry.token for entry in delta.logprobs]) for delta in deltas] == [("a", [b"a"]), ("", [])]
    deltas = taken(answering(stops=("##",), max_new=2), "a#")
    assert deltas[-1].finish_reason == "length"
    assert b"".join(entry.token for delta in deltas for entry in delta.logprobs) == b"a#"


def test_tokens_of_a_call_are_told_from_those_of_the_text() -> None:
    row = answering(stops=("b<##",), max_new=100)  # the text and the beginning of a call are released together
    row.tool_calls = ToolCallParser(HERMES, {"f"})
    call = '<tool_call>{"name": "f"}</tool_call>'
    deltas = taken(row, f"a<b{call}\n{call}\n c<d{call}", end=END)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    texts = [b"".join(entry.token for entry in entries if entry.is_call == is_call) for is_call in (False, True)]
    assert texts[0].decode() == "".join(delta.text for delta in deltas) and texts[1].startswith(call.encode())


@pytest.mark.parametrize(
    ("text", "end", "reason", "num_new"),
    [("abcdef", None, "length", 4), ("ab", END, "stop", 3), ("a##bc", None, "stop", 3)],
    ids=["as long as it may get", "an end id", "a stop string"],
)
def test_only_the_last_delta_has_the_reason(text: str, end: int | None, reason: str, num_new: int) -> None:
    row = answering(stops=("##",), max_new=4)
    row.queued_s = 1.5
    *others, last = taken(row, text, end=end)
    assert (last.finish_reason, last.num_new_tokens, last.num_prompt_tokens) == (reason, num_new, 1)
    assert {delta.finish_reason for delta in others} == {None}
    assert {delta.queued_s for delta in (*others, last)} == {1.5}


def slow_end(text: str, max_repeats: int, min_tokens: int) -> int:
    """Return after how many characters the answer ends: each of its last ones equals the one a passage before it."""
    for end in range(max(min_tokens, 1), len(text) + 1):
        for length in range(1, LONGEST_REPEATED + 1):
            begin = end - max((max_repeats + 1) * length, 24)
            if begin >= 0 and all(text[place] == text[place - length] for place in range(begin + length, end)):
                return end
    return len(text)


REPEATED = [
    *[
        "a" * 40,
        "ab" * 20,
        "abcdefgh" * 5,
        "x" * 30 + "y" + "x" * 30,
        "no repetition here, none at all, not a bit of it",
    ],
    *["The cat sat. " * 9, "q" + "0123456789" * 12, ("m" * 64 + "n") * 4, ("m" * 63 + "n") * 4, "abcabcabcabd" * 6],
]


@pytest.mark.parametrize(("max_repeats", "min_tokens"), [(1, 0), (2, 0), (3, 0), (5, 0), (2, 35)])
@pytest.mark.parametrize("text", REPEATED)
def test_an_answer_ends_when_a_passage_repeats_too_often(text: str, max_repeats: int, min_tokens: int) -> None:
    row = answering(max_new=len(text), max_repeats=max_repeats, min_tokens=min_tokens)
    last = taken(row, text)[-1]
    end = slow_end(text, max_repeats, min_tokens)
    assert (last.num_new_tokens, last.finish_reason) == (end, "stop" if end < len(text) else last.finish_reason)


def test_repetitions_are_kept_without_a_limit_and_where_a_grammar_decides() -> None:
    assert taken(answering(max_new=40), "a" * 40)[-1].num_new_tokens == 40
    grammar = SamplingParams(max_tokens=40, max_repeats=2, grammar=Grammar("regex", "a*"))
    assert taken(row_of(sampling=grammar, max_new_tokens=40), "a" * 40)[-1].num_new_tokens == 40


def test_an_end_id_adds_no_text_and_has_its_log_probability() -> None:
    [_, last] = taken(answering(), "a", end=END)
    [entry] = last.logprobs
    assert (last.text, entry.token, entry.text_offset, entry.is_end) == ("", b"<eos>", 1, True)
    [only] = taken(answering(max_new=1), "", end=END)
    assert (only.finish_reason, only.num_new_tokens, len(only.logprobs)) == ("stop", 1, 1)


def test_end_ids_are_forbidden_until_min_tokens_are_generated() -> None:
    row, forbidden = answering(min_tokens=2), []
    for token in BYTES.encode("abc", add_special_tokens=False).ids:
        forbidden.append(row.draw().forbidden)
        row.append_token(token)
    assert forbidden == [(END,), (END,), ()]


def test_a_stop_string_before_min_tokens_ends_nothing() -> None:
    deltas = taken(answering(stops=("#",), min_tokens=4), "a##b#c")
    assert "".join(delta.text for delta in deltas) == "a##b"
    assert deltas[-1].finish_reason == "stop"


def test_the_draw_has_the_seed_and_the_position_of_the_next_token() -> None:
    row = row_of(tokens=[256, 1, 2], seed=9, max_new_tokens=5)
    assert (row.draw().seed, row.draw().position, row.draw().num_prompt_tokens) == (9, 3, 3)
    row.append_token(65)
    assert (row.draw().position, list(row.draw().tokens), row.draw().num_prompt_tokens) == (4, [256, 1, 2, 65], 3)
    assert (row.num_new_tokens, row.longest_len) == (1, 8)


def test_rows_of_the_same_adapters_have_the_same_set_in_any_order() -> None:
    assert queued_row("ba").adapter_set == queued_row("ab").adapter_set == ("a", "b")
    assert queued_row("ba").weights_digests == ["b", "a"]


@pytest.mark.parametrize(("own", "named"), [(("##",), "##"), (("b", "##"), "b"), ((), None)])
def test_the_last_delta_names_the_clients_stop_string_and_none_of_a_template(
    own: tuple[str, ...], named: str | None
) -> None:
    row = row_of(stops=(*own, "##"), sampling=SamplingParams(stop=own), max_new_tokens=20)
    deltas = taken(row, "ab##c")
    assert [delta.stop for delta in deltas] == [*[None] * (len(deltas) - 1), named]
