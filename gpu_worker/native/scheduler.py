"""Choose the tokens of the next step: one for every decoding row, then prompt chunks while they fit."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_worker.front.row import Row
from gpu_worker.model.attention_plan import Segment

MAX_SCORED_TOKENS = 32
"""Tokens of prompts whose log probabilities one step computes. Each needs logits of the whole vocabulary."""

Scheduled = tuple[Row, Segment]
"""A row and the segment of its tokens that a step computes."""


def schedule(rows: Sequence[Row], max_step_tokens: int, max_chunk_tokens: int) -> list[Scheduled]:
    """Return the rows of the next step with their segments, decoding rows first.

    Every decoding row takes part, with its guesses. With decoding rows, prompts get at most `max_chunk_tokens`, so that
    a long prompt does not stall them. All prompts together get at most `MAX_SCORED_TOKENS` tokens that need log
    probabilities.
    """
    decoding = sorted((row for row in rows if _remaining(row) == 1), key=lambda row: row.kv_row)  # the cache's order
    prefilling = [row for row in rows if _remaining(row) > 1]
    counts = [1 + len(row.guess) for row in decoding]
    budget = min(max_step_tokens, sum(counts) + max_chunk_tokens) if decoding else max_step_tokens
    shares = _shares(_computable(prefilling), budget - sum(counts))
    scheduled: list[Scheduled] = []
    start = 0
    for row, num_tokens in zip((*decoding, *prefilling), (*counts, *shares), strict=True):
        if num_tokens:
            scheduled.append((row, Segment(row.kv_row, start, num_tokens, row.num_computed)))
            start += num_tokens
    return scheduled


def _computable(rows: Sequence[Row]) -> list[int]:
    """Return the tokens of each prompt that the step may compute, if it had room for all of them."""
    left, counts = MAX_SCORED_TOKENS, list[int]()
    for row in rows:
        positions = row.positions_to_score(row.num_computed, len(row.tokens))
        is_cut = len(positions) > left
        counts.append(positions.start + left - row.num_computed if is_cut else _remaining(row))
        left -= min(left, len(positions))
    return counts


def _shares(remaining: Sequence[int], budget: int) -> list[int]:
    """Divide the tokens of a step among prompts, given their remaining tokens in the order of joining the batch.

    The first prompt gets half of the tokens, so it always progresses. The other half goes to the shortest of the other
    prompts, so they do not wait for a long one. Unused tokens of one half go to the other.
    """
    shares = [0] * len(remaining)
    if not remaining:
        return shares
    left = budget - min(remaining[0], budget - budget // 2)
    for place in sorted(range(1, len(remaining)), key=lambda place: remaining[place]):
        shares[place] = min(remaining[place], left)
        left -= shares[place]
    shares[0] = min(remaining[0], budget - sum(shares))
    return shares


def _remaining(row: Row) -> int:
    return len(row.tokens) - row.num_computed
