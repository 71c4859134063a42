"""Which tokens the next step computes: every row that decodes, then prompt chunks as far as the budget goes."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_worker.attention_plan import Segment
from gpu_worker.row import Row

Scheduled = tuple[Row, Segment]
"""A row and the tokens of it that a step computes."""


def schedule(rows: Sequence[Row], max_step_tokens: int, max_chunk_tokens: int) -> list[Scheduled]:
    """Rows with the segment each computes, in step order.

    Every decoding row takes part, and beside one prompts get `max_chunk_tokens` at most: no long prompt stalls it.
    """
    decoding = sorted(
        (row for row in rows if _remaining(row) == 1), key=lambda row: row.kv_row
    )  # as the cache has them
    prefilling = [row for row in rows if _remaining(row) > 1]
    budget = min(max_step_tokens, len(decoding) + max_chunk_tokens) if decoding else max_step_tokens
    scheduled: list[Scheduled] = []
    start = 0
    for row in (*decoding, *prefilling):
        num_tokens = min(_remaining(row), budget - start)
        if num_tokens == 0:
            break
        scheduled.append((row, Segment(row.kv_row, start, num_tokens, row.num_computed)))
        start += num_tokens
    return scheduled


def _remaining(row: Row) -> int:
    return len(row.tokens) - row.num_computed
