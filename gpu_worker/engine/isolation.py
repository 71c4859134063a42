"""Find the rows that a step fails on, so that only they end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from gpu_worker.engine.row import Row
from gpu_worker.engine.scheduler import Scheduled

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """The parts of a step that were computed, each with its result, and the rows that no attempt could compute."""

    computed: list[tuple[Sequence[Scheduled], Result]] = field(default_factory=list)
    failed: list[tuple[Row, Exception]] = field(default_factory=list)


def compute_isolated(
    scheduled: Sequence[Scheduled], compute: Callable[[Sequence[Scheduled]], Result]
) -> Outcome[Result]:
    """Compute the step as a whole; where that raises, compute its halves, and so on down to single rows.

    A row has failed once it raised in an attempt of its own that follows another failed one, and again with the first
    half of its tokens, where it has several: a shorter prompt chunk takes less memory. One bad row among n costs about
    2 · log2(n) + 1 attempts more, and n bad ones 3n. `compute` must be repeatable.
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
        error = exc.with_traceback(None)  # its frames would keep the attempt's tensors, where memory may be short
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
    """Lay the segments out anew, from token 0 of a step of their own."""
    start, laid_out = 0, list[Scheduled]()
    for row, segment in part:
        laid_out.append((row, replace(segment, start=start)))
        start += segment.num_tokens
    return laid_out


def _ids(part: Sequence[Scheduled]) -> str:
    return ", ".join(row.request_id for row, _ in part)
