from __future__ import annotations

import ctypes
import mmap
from copy import copy

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.model.packed_linear import (
    KernelLinear,
    LinearKernel,
    PackedLinear,
    has_bf16_vectors,
    is_kernel_faster,
    may_use_tiles,
    packed,
)
from gpu_worker.native.kernels.kernel_variants import this_processor
from tests.gpu_worker.engine_driver import compiled

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16"
)


TILED = [(1, 0, 32), (1, 32), (15, 64), (16, 32), (17, 96), (2, 16, 64), (33, 64), (70, 64)]
"""Shapes of inputs that tiles can multiply, on processors that have them."""
NUM_INPUTS = pytest.mark.parametrize("num_in", [520, 512], ids=["vectors", "tiles"])


@pytest.fixture(scope="module")
def kernel() -> LinearKernel:
    return compiled(LinearKernel.load)


def linear_of(num_in: int, num_out: int, *, has_bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out, bias=has_bias).bfloat16()


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the products of these bfloat16 numbers in float64."""
    bias = 0 if linear.bias is None else linear.bias.double()
    return x.double() @ linear.weight.double().T + bias


@needs_bf16
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 0, 40), (1, 1, 40), (1, 7, 40), (1, 33, 40), (3, 40)], ids=str)
def test_a_packed_layer_equals_the_plain_one(shape: tuple[int, ...], has_bias: bool) -> None:
    linear, x = linear_of(40, 24, has_bias=has_bias), torch.randn(shape).bfloat16()
    with torch.inference_mode():
        layer = packed(linear, None)
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_out", [1, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("shape", [(1, 0, 40), (1, 1, 40), (11, 2), (1, 12, 40), (13, 6), (2, 18, 66), *TILED], ids=str)
@torch.inference_mode()
def test_the_kernel_rounds_the_exact_products(
    shape: tuple[int, ...], num_out: int, has_bias: bool, kernel: LinearKernel
) -> None:
    linear = linear_of(shape[-1], num_out, has_bias=has_bias)
    x = torch.randn(shape).bfloat16()
    layer = packed(linear, kernel)
    assert isinstance(layer, KernelLinear)
    y, expected = layer(x), exact(linear, x)
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)  # half a unit of bfloat16, and float32 sums


@torch.inference_mode()
def test_the_kernel_reads_views_as_they_are(kernel: LinearKernel) -> None:
    layer, x = packed(linear_of(8, 40), kernel), torch.randn(8, 5).bfloat16().T
    assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


@NUM_INPUTS
@torch.inference_mode()
def test_the_kernel_writes_no_byte_outside_its_outputs(num_in: int, kernel: LinearKernel) -> None:
    layer = packed(linear_of(num_in, 33), kernel)
    assert isinstance(layer, KernelLinear)
    x, y = torch.randn(13, num_in).bfloat16(), torch.full((15, 33), 7.0).bfloat16()
    kernel.linear(layer.address, x.data_ptr(), None, 13, y[1].data_ptr(), 2)
    assert torch.equal(y[1:14], layer(x)) and (y[0] == 7).all() and (y[14] == 7).all()


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 31, 32])
@torch.inference_mode()
def test_the_kernel_reads_no_byte_after_its_inputs(num_rows: int, kernel: LinearKernel) -> None:
    """The inputs end where the page after them may not be read: a read there would end the process."""
    layer, page = packed(linear_of(64, 33), kernel), mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    values = torch.frombuffer(memory, dtype=torch.bfloat16)
    x = values[page // 2 - 64 * num_rows : page // 2].view(num_rows, 64)
    expected = layer(x.copy_(torch.randn(num_rows, 64)).clone())
    protect, guard = ctypes.CDLL(None).mprotect, ctypes.c_void_p(values.data_ptr() + page)
    assert protect(guard, ctypes.c_size_t(page), 0) == 0
    found = layer(x)
    assert protect(guard, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0
    assert torch.equal(found, expected)


def test_any_number_of_threads_packs_the_same_panels(kernel: LinearKernel) -> None:
    weight = linear_of(8, 100).weight.detach()
    one, four = (torch.full((128 * 8 + 1,), 7.0).bfloat16() for _ in range(2))
    for panels, num_threads in ((one, 1), (four, 4)):
        kernel.pack(weight.data_ptr(), *weight.shape, panels.data_ptr(), num_threads)
    assert torch.equal(one, four) and (one[:-1] != 7).all() and one[-1] == 7


@needs_bf16
def test_layers_with_an_odd_number_of_inputs_are_left_to_onednn(kernel: LinearKernel) -> None:
    assert isinstance(packed(linear_of(7, 4), kernel), PackedLinear)


def test_layers_of_other_precisions_are_not_packed(kernel: LinearKernel) -> None:
    linear = nn.Linear(8, 4)
    assert packed(linear, kernel) is linear


def test_tiles_are_used_where_the_processor_and_linux_allow_it(kernel: LinearKernel) -> None:
    assert kernel.has_tiles == (kernel.has_bf16_products and may_use_tiles())
    assert not may_use_tiles() or "amx_bf16" in this_processor().flags


@pytest.mark.parametrize(
    ("has_bf16_products", "has_tiles", "may_use_them", "expected"),
    [(True, False, False, True), (True, False, True, False), (True, True, True, True), (False, False, False, False)],
)
def test_the_kernel_replaces_onednn_if_it_uses_what_the_process_may_use(
    has_bf16_products: bool, has_tiles: bool, may_use_them: bool, expected: bool, kernel: LinearKernel
) -> None:
    made = copy(kernel)
    made.has_bf16_products, made.has_tiles = has_bf16_products, has_tiles
    assert is_kernel_faster(made, may_use_them) is expected


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"avx512_bf16": True}, True), ({"avx2": True}, False)], ids=str
)
def test_processors_without_bfloat16_vectors_are_known(capabilities: dict[str, bool], expected: bool) -> None:
    assert has_bf16_vectors(capabilities) is expected
