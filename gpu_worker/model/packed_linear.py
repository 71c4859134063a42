"""Pack base weights once into the layout that the processor multiplies, instead of at every step."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int32, c_int64, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpu_worker.bank.device_memory import SharedPages
from gpu_worker.model.quantization import QuantizedLinear, QuantizedWeight
from gpu_worker.native.kernels.kernel_loading import Kernel

_STEP_ROWS = 32  # oneDNN chooses the layout for this number of rows; other numbers work too
PANEL = 32  # outputs of a panel of the kernel
_ROWS_PER_READ, _ROWS_PER_READ_TILES, _ROWS_PER_READ_INTEGERS = 11, 26, 5
_ROWS_PER_READ_OLDER, _ROWS_PER_READ_INTEGERS_OLDER = 3, 2  # processors without instructions for these products
_PADDED_INPUTS = 64  # integer weights are padded to a multiple of it


class _Linear(ctypes.Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("num_in", c_int64),
        ("num_out", c_int64),
        ("scales", c_void_p),
        ("bits", c_int32),
        ("group", c_int32),
        ("has_offsets", c_int32),
    )


class LinearKernel(Kernel):
    """The compiled products on the CPU: of bfloat16 numbers, of integers, and of bfloat16 weights and float32 inputs.

    `has_bf16_products`: the library uses the processor's bfloat16 instructions. A prebuilt one for older processors
    does not, nor does one of an old compiler. `has_tiles`: it uses the processor's tiles (AMX) too, as Linux permits.
    `rows_per_read`: rows that a large layer computes in the time in which its weights are read, of bfloat16 numbers and
    of integers.
    """

    library_name = "packed_linear"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.pages = SharedPages()
        self.pack, self.linear = library.pack_bf16, library.linear_bf16
        self.has_bf16_products = bool(library.has_bf16_products())
        self.has_tiles = bool(library.has_tiles())
        self.rows_per_read, self.rows_per_read_of_integers = _ROWS_PER_READ_OLDER, _ROWS_PER_READ_INTEGERS_OLDER
        if self.has_bf16_products:
            self.rows_per_read = _ROWS_PER_READ_TILES if self.has_tiles else _ROWS_PER_READ
        if library.has_integer_products():
            self.rows_per_read_of_integers = _ROWS_PER_READ_INTEGERS
        self.pack.argtypes, self.pack.restype = (c_void_p, c_int64, c_int64, c_void_p, c_int32), None
        self.pack_integers = library.pack_integers
        sizes = c_int32, c_int32, c_int64, c_int64, c_int64
        self.pack_integers.argtypes = c_void_p, c_void_p, *sizes, c_void_p, c_int32
        self.pack_integers.restype = None
        self.linear_f32 = library.linear_f32
        self.linear_parts, self.linear_parts_f32 = library.linear_parts_bf16, library.linear_parts_f32
        self.rows = library.rows_bf16
        self.rows.argtypes, self.rows.restype = (c_void_p, c_void_p, c_int64, c_void_p, c_int32), None
        for function in (self.linear, self.linear_f32, self.linear_parts, self.linear_parts_f32):
            function.argtypes, function.restype = (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int32), None


class NarrowLinear(nn.Linear):
    """A linear layer of a float32 model whose weight is stored as bfloat16, computed slowly.

    It is the reference of the compiled products: those of float32 inputs and of the weights' own values.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # torch declares it as always there

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.stored = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a new tensor each time
        return self.stored.float()

    def forward(self, input: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return nn.functional.linear(input, self.weight, self.bias)

    def rows(self, outputs: Tensor) -> Tensor:  # (N,) -> (N, I)
        """Return the weights of these outputs."""
        return self.stored[outputs].float()


class KernelLinear(nn.Module):
    """A linear layer whose weight is packed for `packed_linear.cpp`. A row's result does not depend on other rows.

    Panels (O / 32, I / 2, 32, 2) bfloat16; O is padded to whole panels. The panels of integer weights are described in
    `quantized_linear.h`. `dtype`: of inputs and outputs; float32 for weights of bfloat16 numbers only.
    """

    def __init__(
        self,
        kernel: LinearKernel,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        is_half = dtype == torch.bfloat16
        self._products = kernel.linear if is_half else kernel.linear_f32
        self._products_of_parts = kernel.linear_parts if is_half else kernel.linear_parts_f32
        self._rows = kernel.rows
        shape = weight.values.shape if isinstance(weight, QuantizedWeight) else weight.shape
        self.out_features, self.in_features = shape
        padded = -(-self.out_features // PANEL) * PANEL
        zeros = kernel.pages.zeros
        self._bias = zeros(padded, dtype=torch.float32)
        if bias is not None:
            self._bias[: self.out_features] = bias.detach()
        self._scales = zeros(padded, dtype=torch.float32)
        bits, group, num_kinds, num_threads = 16, 0, 0, torch.get_num_threads()
        if isinstance(weight, QuantizedWeight):
            assert is_half, "products of integers give bfloat16"
            self.rows_per_read = kernel.rows_per_read_of_integers
            bits, group = weight.bits, weight.group
            halves, self._scales[: self.out_features] = weight.stored_scales()
            num_kinds = 0 if halves is None else len(halves)
            padded_in = -(-self.in_features // _PADDED_INPUTS) * _PADDED_INPUTS
            row_bytes = padded_in * weight.bits // 8 + padded_in // weight.block * 2 * num_kinds
            self._panels = zeros(padded * row_bytes, dtype=torch.uint8)
            values, places = weight.values.contiguous(), None if halves is None else halves.data_ptr()
            sizes = num_kinds, weight.bits, weight.block, *shape
            kernel.pack_integers(values.data_ptr(), places, *sizes, self._panels.data_ptr(), num_threads)
        else:
            self.rows_per_read = kernel.rows_per_read
            assert weight.dtype == torch.bfloat16, "weights must be bfloat16"
            self._panels = zeros(padded * self.in_features, dtype=weight.dtype)
            weight = weight.detach().contiguous()
            kernel.pack(weight.data_ptr(), *shape, self._panels.data_ptr(), num_threads)
        self._layer = _Linear(
            panels=self._panels.data_ptr(),  # the tensors own the memory
            bias=self._bias.data_ptr(),
            num_in=self.in_features,
            num_out=self.out_features,
            scales=self._scales.data_ptr(),
            bits=bits,
            group=group,
            has_offsets=num_kinds == 2,
        )
        self.address = ctypes.addressof(self._layer)  # points to a struct Linear of `packed_linear.cpp`

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        assert x.dtype == self.dtype and x.shape[-1] == self.in_features, "x does not fit the layer"
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        num_rows = x.numel() // self.in_features
        self._products(self.address, x.data_ptr(), None, num_rows, y.data_ptr(), torch.get_num_threads())
        return y

    def rows(self, outputs: Tensor) -> Tensor:  # (N,) -> (N, I)
        """Return the weights of these outputs, or what their integers stand for, rounded to the layer's dtype."""
        outputs = outputs.contiguous()
        assert outputs.dtype == torch.long, "numbers of outputs must be int64"
        if len(outputs) and not 0 <= int(outputs.min()) <= int(outputs.max()) < self.out_features:
            raise IndexError(f"the layer has {self.out_features} outputs")
        y = torch.empty(len(outputs), self.in_features, dtype=torch.bfloat16)
        self._rows(self.address, outputs.data_ptr(), len(outputs), y.data_ptr(), torch.get_num_threads())
        return y.to(self.dtype)

    def some(self, x: Tensor, whole: NDArray[np.int32], parts: NDArray[np.int32]) -> Tensor:
        """Return `forward` of these rows and parts, bit for bit, and -inf elsewhere.

        Dims: x (N, I) -> (N, O); `whole` (W,): rows; `parts` (P, 2): a panel and a row each, those of a panel together.
        """
        assert x.dtype == self.dtype and x.shape[1:] == (self.in_features,), "x does not fit the layer"
        assert whole.dtype == parts.dtype == np.int32 and parts.flags.c_contiguous, "rows and panels must be int32"
        x, num_threads = x.contiguous(), torch.get_num_threads()
        y = x.new_empty(len(x), self.out_features)
        y.index_fill_(0, torch.from_numpy(np.setdiff1d(np.arange(len(x)), whole)), -torch.inf)
        if len(whole):
            own = x.index_select(0, torch.from_numpy(whole))
            places = whole.ctypes.data, len(whole), y.data_ptr()
            self._products(self.address, own.data_ptr(), *places, num_threads)
        places = parts.ctypes.data, len(parts), y.data_ptr()
        self._products_of_parts(self.address, x.data_ptr(), *places, num_threads)
        return y


class PackedLinear(nn.Module):
    """A linear layer with a weight packed by oneDNN. `forward` equals `nn.functional.linear` bit for bit.

    torch 2.13 packs a bfloat16 weight again at each product, which takes a third of a decode step of 32 rows. The
    operators are those that TorchInductor uses to freeze a model.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _STEP_ROWS)
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def packed(linear: nn.Linear, kernel: LinearKernel | None) -> nn.Linear | KernelLinear | PackedLinear:
    """Return the layer with a packed weight if that is known to be faster, else the layer itself.

    `kernel`: used for integer weights and for bfloat16 weights of a float32 model, and instead of oneDNN where it is
    faster and can compute the layer.
    """
    if isinstance(linear, QuantizedLinear):
        if kernel is not None:
            return KernelLinear(kernel, linear.quantized, linear.bias)
        linear.keep_weight()
        return linear
    if isinstance(linear, NarrowLinear) and kernel is not None:
        return KernelLinear(kernel, linear.stored, linear.bias, torch.float32)
    weight = linear.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return linear
    if kernel is not None and linear.in_features % 2 == 0:
        return KernelLinear(kernel, weight, linear.bias)
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not is_built or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear
    return PackedLinear(weight, linear.bias)


def has_bf16_vectors(capabilities: Mapping[str, bool] | None = None) -> bool:
    """Return whether the processor multiplies bfloat16 vectors.

    `capabilities`: of the processor, as torch names them. None: of this one.
    """
    found = torch.cpu.get_capabilities() if capabilities is None else capabilities
    return bool(found.get("avx512_bf16"))


def may_use_tiles() -> bool:
    """Return whether the processor has tiles (AMX) and Linux lets this process use them."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and torch.cpu._init_amx()


def is_kernel_faster(kernel: LinearKernel, tiles: bool | None = None) -> bool:
    """Return whether the kernel is faster than oneDNN: it uses bfloat16 vectors, and tiles if the process may use them.

    `tiles`: whether it may. None: ask.
    """
    return kernel.has_bf16_products and (kernel.has_tiles or not (may_use_tiles() if tiles is None else tiles))
