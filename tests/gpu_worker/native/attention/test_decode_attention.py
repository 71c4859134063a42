"""The compiled code for pages refuses tensors of wrong shapes."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.attention.decode_attention import DecodeKernel, Decodes
from tests.gpu_worker.engine_driver import compiled

HEADS, SLOTS, DIM = 4, 10, 8


@pytest.fixture(scope="module")
def kernel() -> DecodeKernel:
    return compiled(DecodeKernel.load)


@pytest.mark.parametrize("shape", [(2, 1, DIM), (HEADS, 1, DIM - 1), (HEADS, 2, DIM), (1, 1, DIM)], ids=str)
def test_keys_of_another_shape_are_not_written(shape: tuple[int, ...], kernel: DecodeKernel) -> None:
    """The kernel would read beyond the first two heads of four, and store foreign memory."""
    larger = torch.randn(2 * HEADS, 4, 2 * DIM)
    key = larger[: shape[0], : shape[1], : shape[2]]
    keys, values = torch.zeros(2, HEADS, SLOTS, DIM)
    with pytest.raises(AssertionError, match="keys"):
        kernel.write(key, key, torch.tensor([0]), keys, values)
    assert not keys.any() and not values.any()


@pytest.mark.parametrize(
    ("query_shape", "output_shape"),
    [
        ((6, 1, DIM), (1, 6, DIM)),  # not a multiple of the key heads
        ((HEADS, 1, DIM - 1), (1, HEADS, DIM - 1)),
        ((HEADS, 1, DIM), (1, HEADS, DIM - 1)),
    ],
)
def test_queries_of_another_shape_are_refused(
    query_shape: tuple[int, ...], output_shape: tuple[int, ...], kernel: DecodeKernel
) -> None:
    keys, values = torch.zeros(2, HEADS, SLOTS, DIM)
    output = torch.full(output_shape, 7.0)
    decodes = Decodes([Segment(row=0, start=0, num_tokens=1, context_len=2)])
    with pytest.raises(AssertionError, match=r"quer|output"):
        query, table = torch.zeros(query_shape), (torch.zeros(1, 2, dtype=torch.long), 5)
        kernel.attend(decodes, query, keys, values, output, table, scaling=1.0, sliding_window=None)
    assert (output == 7).all()
