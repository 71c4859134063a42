"""The compiled conversion of an adapter, compared with torch's operations value by value."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from gpu_worker.bank.bank_layout import Arrangement, BankLayout
from gpu_worker.bank.layout_kernel import LayoutKernel
from lora_store.adapter import ModuleWeights
from lora_store.weights_blob import decode_weights, encode_weights

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {str(size): size for size in [(1, 1, 1), (8, 640, 2048), (3, 17, 15), (16, 16, 33), (70, 5, 31)]}
"""Rank, in and out of modules whose values are one behind the other."""
SHARED = {f"{layer}.{leaf}": (5, 33, num_out) for layer in "ab" for leaf, num_out in
          (("q_proj", 40), ("k_proj", 17), ("v_proj", 17), ("o_proj", 33))}  # fmt: skip
"""Modules in blocks, whose A matrices are columns of a wider matrix."""


def weights_of(rank: int, num_in: int, num_out: int, dtype: torch.dtype, scaling: float = 1.7) -> ModuleWeights:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
    return ModuleWeights(a.to(dtype), b.to(dtype), scaling)


def arrangement_of(modules: Mapping[str, ModuleWeights]) -> Arrangement:
    shapes = {name: (module.lora_b.shape[0], module.lora_a.shape[1]) for name, module in modules.items()}
    return BankLayout(shapes).arrangement({name: module.rank for name, module in modules.items()})


def framed(arrangement: Arrangement, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a frame of sevens, and the part of it for the values."""
    frame = torch.full((arrangement.num_values + 2,), 7.0, dtype=dtype)
    return frame, frame[1:-1]


def spoiled_in(kernel: LayoutKernel, modules: Mapping[str, ModuleWeights], dtype: torch.dtype) -> list[str]:
    arrangement = arrangement_of(modules)
    return kernel(modules, arrangement, framed(arrangement, dtype)[1])


def stored(modules: Mapping[str, ModuleWeights]) -> Mapping[str, ModuleWeights]:
    """Return the modules as views of their blob."""
    return decode_weights(*encode_weights(modules)).modules


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", [*DTYPES, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("is_stored", [False, True], ids=["tensors", "blob"])
@pytest.mark.parametrize("sizes", [SIZES, SHARED], ids=["separate", "blocks"])
def test_every_matrix_is_converted_as_by_torch_and_nothing_else_is_written(
    layout_kernel: LayoutKernel,
    source: torch.dtype,
    target: torch.dtype,
    is_stored: bool,
    sizes: Mapping[str, tuple[int, int, int]],
) -> None:
    """Two adapters with one header, since the second reuses the offsets of the first."""
    for scaling in (1.7, 1.7, 0.3):
        modules = {name: weights_of(*size, source, scaling) for name, size in sizes.items()}
        arrangement = arrangement_of(modules)
        assert bool(arrangement.runs) == (sizes is SHARED)
        frame, flat = framed(arrangement, target)
        assert layout_kernel(stored(modules) if is_stored else modules, arrangement, flat) == []
        expected, inner = framed(arrangement, target)
        for name, place in arrangement.places(inner).items():
            place.a.copy_(modules[name].lora_a.to(target))
            place.bt.copy_((modules[name].lora_b.float() * scaling).T.to(target))
        torch.testing.assert_close(frame, expected, atol=0, rtol=0)


def test_a_source_of_any_strides_is_read_in_order(layout_kernel: LayoutKernel) -> None:
    plain = weights_of(3, 20, 30, torch.float32)
    strided = ModuleWeights(plain.lora_a.T.contiguous().T, plain.lora_b.T.contiguous().T, plain.scaling)
    assert not strided.lora_a.is_contiguous()
    arrangement = arrangement_of({"m": plain})
    frames = [framed(arrangement, torch.bfloat16) for _ in range(2)]
    for weights, (_, flat) in zip((plain, strided), frames, strict=True):
        layout_kernel({"m": weights}, arrangement, flat)
    assert torch.equal(frames[0][0], frames[1][0])


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(
    layout_kernel: LayoutKernel, target: torch.dtype, size: tuple[int, int, int], value: float
) -> None:
    for part in ("lora_a", "lora_b"):
        weights = {name: weights_of(*size, torch.float32) for name in ("good", "spoiled", "last")}
        getattr(weights["spoiled"], part)[-1, -1] = value
        assert spoiled_in(layout_kernel, weights, target) == ["spoiled"]
        assert spoiled_in(layout_kernel, stored(weights), target) == ["spoiled"]


def test_values_that_overflow_only_once_scaled_or_rounded_are_found(layout_kernel: LayoutKernel) -> None:
    largest = torch.finfo(torch.float32).max
    weights = {name: weights_of(2, 20, 20, torch.float32) for name in ("scaled", "rounded", "good")}
    weights["scaled"].lora_b[0, 0] = largest / 1.5
    weights["rounded"].lora_a[0, 0] = largest
    weights["good"].lora_a[0, 0] = torch.finfo(torch.bfloat16).max
    assert spoiled_in(layout_kernel, weights, torch.bfloat16) == ["scaled", "rounded"]


def test_it_serves_the_dtypes_that_it_writes(layout_kernel: LayoutKernel) -> None:
    assert [layout_kernel.serves(dtype) for dtype in (*DTYPES, torch.float16)] == [True, True, False]
