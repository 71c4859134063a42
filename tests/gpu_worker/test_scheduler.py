"""Which tokens a step computes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.request import SamplingParams
from gpu_worker.row import Row
from gpu_worker.scheduler import schedule
from gpu_worker.text_stream import TextStream
from gpu_worker.token_bytes import TokenBytes
from lora_store.plan import BASE_PLAN
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer().backend_tokenizer


def row_of(kv_row: int, num_tokens: int, num_computed: int) -> Row:
    return Row(
        request_id=str(kv_row),
        plan=BASE_PLAN,
        sampling=SamplingParams(),
        tokens=list(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        max_new_tokens=1,
        end_ids=frozenset(),
        seed=0,
        text=TextStream(TOKENIZER, ()),
        sink=lambda event: None,
        spell=TokenBytes(byte_tokenizer().backend_tokenizer),
        kv_row=kv_row,
        num_computed=num_computed,
    )


def shown(rows: list[Row], budget: int, chunk: int = 100) -> list[tuple[int, int, int, int]]:
    """(kv row, start in the step, tokens, tokens before) of every segment."""
    return [(s.row, s.start, s.num_tokens, s.context_len) for _, s in schedule(rows, budget, chunk)]


@pytest.mark.parametrize(
    ("rows", "budget", "expected"),
    [
        ([], 8, []),
        ([row_of(0, 5, 0)], 8, [(0, 0, 5, 0)]),
        ([row_of(0, 20, 0)], 8, [(0, 0, 8, 0)]),
        ([row_of(0, 20, 16)], 8, [(0, 0, 4, 16)]),
        ([row_of(0, 20, 0), row_of(1, 9, 8)], 8, [(1, 0, 1, 8), (0, 1, 7, 0)]),  # decoding goes first
        ([row_of(0, 3, 0), row_of(1, 9, 0), row_of(2, 9, 0)], 8, [(0, 0, 3, 0), (1, 3, 5, 0)]),
    ],
)
def test_a_step(rows: list[Row], budget: int, expected: list[tuple[int, int, int, int]]) -> None:
    assert shown(rows, budget) == expected


def test_beside_decoding_rows_prompts_are_read_in_smaller_chunks() -> None:
    rows = [row_of(0, 20, 0), row_of(1, 9, 8), row_of(2, 9, 0)]
    assert shown(rows, 16, chunk=4) == [(1, 0, 1, 8), (0, 1, 4, 0)]
    assert shown(rows, 3, chunk=4) == [(1, 0, 1, 8), (0, 1, 2, 0)]
    assert shown(rows[::2], 24, chunk=4) == [(0, 0, 20, 0), (2, 20, 4, 0)], "nobody decodes"
    rows = [row_of(0, 3, 0), *rows[1:]]
    assert shown(rows, 16, chunk=4) == [(1, 0, 1, 8), (0, 1, 3, 0), (2, 4, 1, 0)]


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
