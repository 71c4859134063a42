from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest
import torch
from torch import Tensor

from gpu_worker.errors import LogitsNotFinite
from gpu_worker.front.calls import CompletionSink, Prober, wait_for_first_logits
from gpu_worker.front.delta_stream import Events
from gpu_worker.front.request.request import Delta, Job

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
async def test_a_probe_ends_with_its_row(events: list[Delta | Exception], expected: object) -> None:
    queue = Events()
    for event in events:
        queue.put_nowait(event)
    found = await wait_for_first_logits(queue)
    assert found is expected or isinstance(found, expected)  # type: ignore[arg-type]


async def load(weights_digests: Collection[str]) -> None:
    """Load nothing."""


async def test_a_probe_refuses_logits_that_are_not_finite() -> None:
    """vLLM computes on with such logits, where the native engine fails the row."""
    found = {"base": LOGITS, "a": LOGITS * 1.5, "b": torch.tensor([1.0, torch.nan, 1.0]), "c": LOGITS * torch.inf}

    async def first_logits(jobs: Sequence[Job]) -> list[Tensor | Exception]:
        return [found[job.plan.adapters[0].weights_digest if job.plan.adapters else "base"] for job in jobs]

    good, *bad = await Prober(first_logits, load, torch.float32).shifts(["a", "b", "c"])
    assert good == 0.5
    assert [type(error) for error in bad] == [LogitsNotFinite] * 2
    found["base"] = found["b"]
    with pytest.raises(LogitsNotFinite, match="base model"):
        await Prober(first_logits, load, torch.float32).shifts(["a"])
