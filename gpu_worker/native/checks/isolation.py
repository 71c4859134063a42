"""Find the rows that make a step fail, so that only they end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from gpu_worker.front.row import Row
from gpu_worker.native.scheduler import Scheduled

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """The computed parts of a step with their results, and the rows that failed in every attempt."""

    computed: list[tuple[Sequence[Scheduled], Result]] = field(default_factory=list)
    failed: list[tuple[Row, Exception]] = field(default_factory=list)


def compute_isolated(
    scheduled: Sequence[Scheduled], compute: Callable[[Sequence[Scheduled]], Result]
) -> Outcome[Result]:
    """Compute the step as a whole. If that raises, compute its halves, and so on down to single rows.

    A single row is retried with the first half of its tokens, because a shorter prompt chunk needs less memory. It has
    failed if it raises alone, after an earlier failure, and again with half of its tokens (if it has several). One bad
    row among n costs about 2 · log2(n) + 1 extra attempts, n bad rows 3n. `compute` must be repeatable.
    """
    outcome: Outcome[Result] = Outcome()
    _compute(scheduled, compute, outcome, is_retry=False)
    return outcome


def _compute(
    part: Sequence[Scheduled],
    compute: Callable[[Sequence[Scheduled]], Result],
    outcome: Outcome[Result],
    *,
    is_retry: bool,
    is_halved: bool = False,
) -> None:
    try:
        outcome.computed.append((part, compute(part)))
        return
    except Exception as exc:
        logger.warning("computing %d rows failed: %s", len(part), _ids(part), exc_info=True)
        error = exc.with_traceback(None)  # frames would keep the attempt's tensors alive
    if is_retry and len(part) == 1:
        [(row, segment)] = part
        if is_halved or segment.num_tokens == 1:
            outcome.failed.append((row, error))
        else:
            half = replace(segment, num_tokens=segment.num_tokens // 2)
            _compute([(row, half)], compute, outcome, is_retry=True, is_halved=True)
        return
    middle = len(part) // 2
    for piece in (part[:middle], part[middle:]):
        if piece:
            _compute(_restarted(piece), compute, outcome, is_retry=True)


def _restarted(part: Sequence[Scheduled]) -> list[Scheduled]:
    """Move the segments to a step of their own, starting at token 0."""
    start, laid_out = 0, list[Scheduled]()
    for row, segment in part:
        laid_out.append((row, replace(segment, start=start)))
        start += segment.num_tokens
    return laid_out


def _ids(part: Sequence[Scheduled]) -> str:
    return ", ".join(row.request_id for row, _ in part)
