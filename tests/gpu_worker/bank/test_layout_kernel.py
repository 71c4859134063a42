"""The compiled conversion of an adapter, compared with torch's operations value by value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpu_worker.bank.device_layout import DeviceModule
from gpu_worker.bank.layout_kernel import LayoutKernel
from lora_store.adapter import ModuleWeights

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1, 1), (8, 640, 2048), (3, 17, 15), (16, 16, 33), (70, 5, 31)]  # rank, in, out


def weights_of(rank: int, num_in: int, num_out: int, dtype: torch.dtype, scaling: float = 1.7) -> ModuleWeights:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
    return ModuleWeights(a.to(dtype), b.to(dtype), scaling)


def place_of(weights: ModuleWeights, dtype: torch.dtype) -> tuple[Tensor, DeviceModule]:
    """Return a frame of sevens, and places within it: columns of wider rows for A."""
    rank, num_in, num_out = weights.rank, weights.lora_a.shape[1], weights.lora_b.shape[0]
    frame = torch.full((2 * rank + 1, num_in + num_out + 2), 7.0, dtype=dtype)
    return frame, DeviceModule(frame[:rank, 1 : num_in + 1], frame[rank + 1 :, 1 : num_out + 1])


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_every_matrix_is_converted_as_by_torch_and_nothing_else_is_written(
    layout_kernel: LayoutKernel,
    source: torch.dtype,
    target: torch.dtype,
) -> None:
    weights = {str(size): weights_of(*size, source) for size in SIZES}
    framed = {name: place_of(each, target) for name, each in weights.items()}
    assert layout_kernel(weights, {name: place for name, (_, place) in framed.items()}) == []
    for name, each in weights.items():
        frame, place = framed[name]
        expected, same = place_of(each, target)
        same.a.copy_(each.lora_a.to(target))
        same.bt.copy_((each.lora_b.float() * each.scaling).T.to(target))
        torch.testing.assert_close(frame, expected, atol=0, rtol=0)
        assert place.a.data_ptr() == frame[:, 1:].data_ptr()


def test_a_source_of_any_strides_is_read_in_order(layout_kernel: LayoutKernel) -> None:
    plain = weights_of(3, 20, 30, torch.float32)
    strided = ModuleWeights(plain.lora_a.T.contiguous().T, plain.lora_b.T.contiguous().T, plain.scaling)
    assert not strided.lora_a.is_contiguous()
    frames = [place_of(plain, torch.bfloat16) for _ in range(2)]
    for weights, (_, place) in zip((plain, strided), frames, strict=True):
        layout_kernel({"m": weights}, {"m": place})
    assert torch.equal(frames[0][0], frames[1][0])


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(
    layout_kernel: LayoutKernel,
    target: torch.dtype,
    size: tuple[int, int, int],
    value: float,
) -> None:
    for part in ("lora_a", "lora_b"):
        weights = {name: weights_of(*size, torch.float32) for name in ("good", "spoiled", "last")}
        getattr(weights["spoiled"], part)[-1, -1] = value
        places = {name: place_of(each, target)[1] for name, each in weights.items()}
        assert layout_kernel(weights, places) == ["spoiled"]


def test_values_that_overflow_only_once_scaled_or_rounded_are_found(layout_kernel: LayoutKernel) -> None:
    largest = torch.finfo(torch.float32).max
    weights = {name: weights_of(2, 20, 20, torch.float32) for name in ("scaled", "rounded", "good")}
    weights["scaled"].lora_b[0, 0] = largest / 1.5
    weights["rounded"].lora_a[0, 0] = largest
    weights["good"].lora_a[0, 0] = torch.finfo(torch.bfloat16).max
    places = {name: place_of(each, torch.bfloat16)[1] for name, each in weights.items()}
    assert layout_kernel(weights, places) == ["scaled", "rounded"]


def test_it_serves_the_dtypes_that_it_writes(layout_kernel: LayoutKernel) -> None:
    assert [layout_kernel.serves(dtype) for dtype in (*DTYPES, torch.float16)] == [True, True, False]
