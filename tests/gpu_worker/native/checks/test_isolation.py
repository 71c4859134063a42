"""Finding the rows that make a step fail, compared with a loop that computes every row alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from gpu_worker.front.row import Row
from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.checks.isolation import compute_isolated
from gpu_worker.native.scheduler import Scheduled
from tests.gpu_worker.engine_driver import MakeEngine, greedy


class BadRow(Exception):
    """The error of an attempt with a bad row."""


@pytest.fixture
def step_of(make_engine: MakeEngine) -> Callable[[int], list[Scheduled]]:
    """A step of n rows, of one to five tokens each."""
    engine, random_of = make_engine({}), random.Random(3)

    def make(num_rows: int) -> list[Scheduled]:
        scheduled, start = [], 0
        for number in range(num_rows):
            row = engine.prepare(greedy("x", request_id=number), lambda event: None)
            num_tokens = random_of.randint(1, 5)
            scheduled.append((row, Segment(number, start, num_tokens, random_of.randint(0, 9))))
            start += num_tokens
        return scheduled

    return make


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("num_bad", [0, 1, 2, 32])
def test_only_bad_rows_fail_and_all_others_are_computed_once(
    num_rows: int, num_bad: int, step_of: Callable[[int], list[Scheduled]]
) -> None:
    scheduled = step_of(num_rows)
    bad = random.Random(num_rows).sample([row for row, _ in scheduled], min(num_bad, num_rows))
    attempts: list[int] = []

    def compute(part: Sequence[Scheduled]) -> list[Row]:
        attempts.append(len(part))
        expected_start = 0
        for _, segment in part:
            assert segment.start == expected_start, "each part is laid out as a step of its own"
            expected_start = segment.end
        if any(row in bad for row, _ in part):
            raise BadRow
        return [row for row, _ in part]

    outcome = compute_isolated(scheduled, compute)
    assert {row.request_id for row, _ in outcome.failed} == {row.request_id for row in bad}
    assert all(isinstance(error, BadRow) and error.__traceback__ is None for _, error in outcome.failed)
    computed = [row for part, rows in outcome.computed for row, _ in part if row in rows]
    assert computed == [row for row, _ in scheduled if row not in bad], "in the order of the step"
    segments = {row.request_id: segment for part, _ in outcome.computed for row, segment in part}
    for row, segment in scheduled:
        if row not in bad:
            found = segments[row.request_id]
            assert (found.row, found.num_tokens, found.context_len) == (
                segment.row,
                segment.num_tokens,
                segment.context_len,
            )
    depth = math.ceil(math.log2(num_rows)) + 1
    assert len(attempts) <= 1 + len(bad) * (2 * depth + 1)
    assert len(attempts) <= 3 * num_rows


def test_a_lone_row_is_computed_once_more_before_it_fails(step_of: Callable[[int], list[Scheduled]]) -> None:
    failures = [BadRow(), None]

    def compute(part: Sequence[Scheduled]) -> int:
        failure = failures.pop(0)
        if failure is not None:
            raise failure
        return len(part)

    outcome = compute_isolated(step_of(1), compute)
    assert [result for _, result in outcome.computed] == [1]
    assert (outcome.failed, failures) == ([], [])


@pytest.mark.parametrize(
    ("num_tokens", "most_tokens", "tried", "computed"),
    [(9, 9, [9], [9]), (9, 4, [9, 9, 4], [4]), (2, 1, [2, 2, 1], [1]), (9, 3, [9, 9, 4], []), (1, 0, [1, 1], [])],
)
def test_a_lone_prompt_chunk_is_halved_once_before_its_row_fails(
    num_tokens: int, most_tokens: int, tried: list[int], computed: list[int], make_engine: MakeEngine
) -> None:
    row = make_engine({}).prepare(greedy("x"), lambda event: None)
    attempts: list[int] = []

    def compute(part: Sequence[Scheduled]) -> None:
        [(_, segment)] = part
        assert (segment.row, segment.start, segment.context_len) == (3, 0, 5), "the first tokens of the segment"
        attempts.append(segment.num_tokens)
        if segment.num_tokens > most_tokens:
            raise BadRow

    outcome = compute_isolated([(row, Segment(3, 0, num_tokens, 5))], compute)
    assert attempts == tried
    assert [segment.num_tokens for part, _ in outcome.computed for _, segment in part] == computed
    assert [failed for failed, _ in outcome.failed] == ([] if computed else [row])
