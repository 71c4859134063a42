from __future__ import annotations

import asyncio

import pytest
import torch

from gpu_worker.front.calls import CompletionSink, wait_for_first_logits
from gpu_worker.front.delta_stream import Events
from gpu_worker.front.request.request import Delta

LOGITS = torch.ones(3)


@pytest.mark.parametrize("last", [Delta("a", 2, 1, "stop"), ValueError("refused")], ids=["answered", "failed"])
def test_the_end_of_a_cancelled_request_is_dropped(last: Delta | Exception) -> None:
    answer = CompletionSink()
    answer.future.cancel()
    answer(last)
    assert answer.future.cancelled()


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([Delta("", 2, 0), Delta("a", 2, 1, "length", LOGITS)], LOGITS),
        ([Delta("", 2, 0), Delta("", 2, 0, "length")], RuntimeError),
        ([Delta("", 2, 0), ValueError("refused")], ValueError),
    ],
    ids=["computed", "ended without logits", "failed"],
)
def test_a_probe_ends_with_its_row(events: list[Delta | Exception], expected: object) -> None:
    async def main() -> object:
        queue = Events()
        for event in events:
            queue.put_nowait(event)
        return await asyncio.wait_for(wait_for_first_logits(queue), 60)

    found = asyncio.run(main())
    assert found is expected or isinstance(found, expected)  # type: ignore[arg-type]
