"""The best ids, compared with a loop over every number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpu_worker.native.sampling.argmax import argmax


def slow_argmax(logits: Tensor) -> tuple[list[int], list[bool]]:
    ids, finite = [], []
    for row in logits.float().tolist():
        finite.append(all(value < math.inf for value in row) and max(row) > -math.inf)  # also false for NaN
        ids.append(max(range(len(row)), key=lambda index: row[index]))
    return ids, finite


def listed(logits: Tensor) -> tuple[list[int], list[bool]]:
    ids, is_sound = argmax(logits)
    return ids.tolist(), is_sound.tolist()


ROWS = {
    "random": lambda row: row,
    "ties": lambda row: row.round(),
    "all equal": lambda row: torch.full_like(row, 1.5),
    "zeros of both signs": lambda row: torch.where(row > 0, -0.0, 0.0),
    "negatives only": lambda row: -row.abs() - 1,
    "some forbidden": lambda row: row.masked_fill(row > 1, -math.inf),
    "nothing possible": lambda row: torch.full_like(row, -math.inf),
    "the last": lambda row: torch.arange(len(row)).to(row.dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [512, 100], ids=["blocks", "no blocks"])
@pytest.mark.parametrize("names", [[name] for name in ROWS] + [list(ROWS)], ids=str)
def test_the_first_of_the_largest_is_found(names: list[str], size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.stack([ROWS[name](torch.randn(size, generator=generator).to(dtype)) for name in names])
    assert listed(logits) == slow_argmax(logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [512, 100], ids=["blocks", "no blocks"])
def test_an_empty_batch_has_no_ids(size: int, dtype: torch.dtype) -> None:
    assert listed(torch.zeros(0, size, dtype=dtype)) == ([], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", [0, 300, 511])
def test_a_row_with_nan_is_unsound_and_others_are_sound(place: int, sign: float, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0, place] = torch.copysign(torch.tensor(math.nan), torch.tensor(sign)).to(dtype)
    assert listed(logits)[1] == [False, True]
    logits[0, place] = math.inf
    assert listed(logits)[1] == [False, True]
