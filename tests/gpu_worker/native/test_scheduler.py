"""The choice of a step's tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.front.request.request import SamplingParams
from gpu_worker.front.row import Row
from gpu_worker.native.scheduler import MAX_SCORED_TOKENS, schedule
from tests.gpu_worker import rows as unprepared


def row_of(kv_row: int, num_tokens: int, num_computed: int, **changes: object) -> Row:
    tokens = range(num_tokens)
    return unprepared.row_of(request_id=str(kv_row), tokens=tokens, kv_row=kv_row, num_computed=num_computed, **changes)


def scored_row(kv_row: int, num_tokens: int, num_computed: int = 0) -> Row:
    return row_of(kv_row, num_tokens, num_computed, sampling=SamplingParams(prompt_logprobs=1))


def shown(rows: list[Row], budget: int, chunk: int = 100) -> list[tuple[int, int, int, int]]:
    """Return (kv row, start in the step, tokens, tokens before) of every segment."""
    return [(s.row, s.start, s.num_tokens, s.context_len) for _, s in schedule(rows, budget, chunk)]


@pytest.mark.parametrize(
    ("rows", "budget", "expected"),
    [
        ([], 8, []),
        ([row_of(0, 5, 0)], 8, [(0, 0, 5, 0)]),
        ([row_of(0, 20, 0)], 8, [(0, 0, 8, 0)]),
        ([row_of(0, 20, 16)], 8, [(0, 0, 4, 16)]),
        ([row_of(0, 20, 0), row_of(1, 9, 8)], 8, [(1, 0, 1, 8), (0, 1, 7, 0)]),  # decoding rows are first
        ([row_of(0, 3, 0), row_of(1, 9, 0), row_of(2, 9, 0)], 8, [(0, 0, 3, 0), (1, 3, 5, 0)]),
    ],
)
def test_the_segments_of_a_step(rows: list[Row], budget: int, expected: list[tuple[int, int, int, int]]) -> None:
    assert shown(rows, budget) == expected


def test_with_decoding_rows_prompts_are_computed_in_smaller_chunks() -> None:
    rows = [row_of(0, 20, 0), row_of(1, 9, 8), row_of(2, 9, 0)]
    assert shown(rows, 16, chunk=4) == [(1, 0, 1, 8), (0, 1, 2, 0), (2, 3, 2, 0)]
    assert shown(rows, 3, chunk=4) == [(1, 0, 1, 8), (0, 1, 1, 0), (2, 2, 1, 0)]
    assert shown(rows, 2, chunk=4) == [(1, 0, 1, 8), (0, 1, 1, 0)]
    assert shown(rows[::2], 24, chunk=4) == [(0, 0, 15, 0), (2, 15, 9, 0)], "no row decodes"


def steps_until_read(row: Row, rows: list[Row], *, arriving: int = 0) -> int:
    """Return the steps until the row's prompt is computed; `arriving` short prompts join in each of them."""
    for count in range(1, 1000):
        for _ in range(arriving):
            rows.append(row_of(len(rows), 20, 0))
        for each, segment in schedule(rows, 1024, 192):
            each.num_computed += segment.num_tokens
            if each.num_computed == len(each.tokens):
                rows.remove(each)
        if row not in rows:
            return count
    raise AssertionError("the prompt is never read")


@pytest.mark.parametrize("num_ahead", [1, 5])
def test_a_short_prompt_does_not_wait_for_the_long_ones_before_it(num_ahead: int) -> None:
    decoding, short = row_of(0, 9, 8), row_of(99, 20, 0)
    ahead = [row_of(1 + number, 8000, 0) for number in range(num_ahead)]
    assert (99, 20) in [(s.row, s.num_tokens) for _, s in schedule([decoding, *ahead, short], 1024, 192)]
    assert steps_until_read(short, [*ahead, short]) == 1


@pytest.mark.parametrize("arriving", [1, 30, 60])
def test_a_long_prompt_progresses_while_short_ones_keep_arriving(arriving: int) -> None:
    long = row_of(0, 8000, 0)
    assert steps_until_read(long, [long], arriving=arriving) <= 2 * 8000 / 1024 + 1


def test_a_later_prompt_is_computed_in_its_turn_at_the_latest() -> None:
    first, second = row_of(0, 4000, 0), row_of(1, 4000, 0)
    assert steps_until_read(second, [first, second], arriving=60) <= 2 * 8000 / 1024 + 2


@settings(deadline=None)
@given(st.data())
def test_no_long_prompt_stalls_a_decoding_row_and_segments_are_adjacent(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    rows = [row_of(i, length, data.draw(st.integers(0, length - 1))) for i, length in enumerate(lengths)]
    budget = data.draw(st.integers(len(rows), 64))
    chunk = data.draw(st.integers(1, 64))
    scheduled = schedule(rows, budget, chunk)
    position = 0
    for row, segment in scheduled:
        assert segment.start == position and segment.num_tokens > 0
        assert segment.row == row.kv_row and segment.context_len == row.num_computed
        assert segment.total_len <= len(row.tokens)
        position = segment.end
    remaining = sum(len(row.tokens) - row.num_computed for row in rows)
    decoding = {row.kv_row for row in rows if len(row.tokens) - row.num_computed == 1}
    most = min(budget, len(decoding) + chunk) if decoding else budget
    assert position == min(most, remaining), "the budget is used up, never exceeded"
    assert decoding <= {segment.row for _, segment in scheduled}


def test_a_step_scores_few_tokens_of_all_prompts_together_and_the_first_prompt_always_progresses() -> None:
    most = MAX_SCORED_TOKENS
    assert shown([scored_row(0, 500), scored_row(1, 500)], 1024) == [(0, 0, most, 0)]
    assert shown([scored_row(0, 11), scored_row(1, 500)], 1024) == [(0, 0, 11, 0), (1, 11, most - 10, 0)]
    assert shown([scored_row(0, 500), row_of(1, 90, 0)], 1024) == [(0, 0, most, 0), (1, most, 90, 0)]
    assert shown([scored_row(0, most + 1)], 1024) == [(0, 0, most + 1, 0)], "the last token needs no score"


def test_a_preempted_prompt_computes_tokens_that_have_scores_at_once() -> None:
    row = scored_row(0, 500)
    row.prompt += row.prompt * 299  # 300 tokens are scored
    assert shown([row], 1024) == [(0, 0, 299 + MAX_SCORED_TOKENS, 0)]
    row.prompt += row.prompt[:1] * 200
    assert shown([row], 1024) == [(0, 0, 500, 0)]
