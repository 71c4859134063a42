"""Sampling with torch as on a GPU: it waits for no number, and equals sampling on the host."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_worker.front.draw import make_table
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling import sampling_torch
from gpu_worker.native.sampling.sampling import with_masks
from tests.gpu_worker.random_draws import random_batch, random_draw


def test_reading_values_on_the_host_does_not_change_the_choice() -> None:
    chance = random.Random(2)
    for _ in range(20):
        logits, draws = random_batch(chance, 8, 3000)
        draws = [
            replace(draw, params=replace(draw.params, top_k=0, top_p=chance.choice([0.5, 0.95]))) for draw in draws
        ]
        table = make_table(draws, 3000)
        found = [sampling_torch.choose(logits, table, on_host=on_host).tolist() for on_host in (False, True)]
        assert found[0] == found[1]


class Waits(TorchDispatchMode):
    """Records every operation for which the host would wait for a GPU: reading a number, or counting true values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        name = func.overloadpacket.__name__
        indexes = [
            part for part in (args[1] if name in ("index", "index_put", "index_put_") else []) if part is not None
        ]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"):
            self.found.append(name)
        if any(part.dtype == torch.bool for part in indexes):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def test_the_torch_code_never_waits_for_the_device() -> None:
    """No number is read before all results arrive at once, and the number of operations is independent of the rows."""
    chance = random.Random(1)
    counts = []
    for num_rows in (8, 32):
        kinds = [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=40), SamplingParams(top_p=0.9)]
        draws = [replace(random_draw(chance, 300), params=kinds[i % 4]) for i in range(num_rows)]
        logits, table = torch.randn(num_rows, 300), make_table(draws, 300)
        allowed = np.full(10, 2**32 - 1, np.uint32)
        masked = [replace(draw, allowed=allowed if i % 2 else None) for i, draw in enumerate(draws)]
        with Waits() as waits:
            tokens = sampling_torch.choose(with_masks(logits, masked, is_copy=False), table, on_host=False)
            sampling_torch.score(logits, tokens, list(range(num_rows)), 5, on_host=False)
        assert waits.found == []
        counts.append(waits.num_operations)
    assert counts[0] == counts[1] > 50
    with Waits() as waits:
        assert float(logits[0, 0]) == logits[0, 0].item()
    assert waits.found, "the recorder sees a number that is read"


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1000, 6000])
def test_the_largest_are_those_of_a_stable_sort(vocabulary: int) -> None:
    """With ties, negative numbers and both zeros."""
    rows = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    rows[0], rows[1], rows[2] = 0.0, rows[1].round(), -rows[2].abs()
    rows[3] = torch.where(rows[3] > 0, 0.0, -0.0)
    for count in {1, min(20, vocabulary), vocabulary}:
        found, ids = sampling_torch.largest(rows, count)
        for row, values, own in zip(rows.tolist(), found.tolist(), ids.tolist(), strict=True):
            expected = sorted(range(vocabulary), key=lambda i: (-row[i], i))[:count]
            assert own == expected
            assert values == [row[i] for i in expected]
