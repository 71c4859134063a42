"""The products of integers equal a slow loop, on every kind of processor whose code runs here.

So do those of bfloat16 weights and float32 inputs, on the kinds of processors that have no bfloat16 instructions.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.model.packed_linear import KernelLinear, LinearKernel
from gpu_worker.model.quantization import GROUP, SMALL_GROUP, QuantizedWeight, quantize, round_to_halves, rounded_inputs
from gpu_worker.native.kernels.kernel_build import FOLDER, Compiler, file_name, name_library
from gpu_worker.native.kernels.kernel_loading import load_library, share_openmp
from gpu_worker.native.kernels.kernel_variants import VARIANTS, this_processor
from lora_store.location import DEFAULT_CACHE_DIR
from tests.gpu_worker.engine_driver import compiled

GROUPS = {"int8": 0, "int8 in groups": GROUP, "int8 in small groups": SMALL_GROUP}
KINDS = (*GROUPS, "int4", "int4 with offsets")
_ARM = "aarch64-linux-gnu-g++"


@pytest.fixture(scope="module")
def kernel() -> LinearKernel:
    return compiled(LinearKernel.load)


@pytest.fixture(scope="module", params=["x86-64", "x86-64-v3"])
def other_kernel(request: pytest.FixtureRequest) -> LinearKernel:
    """The library for older processors, whose code has no VNNI, compiled again only after a change."""
    this = this_processor()
    older = next(variant for variant in VARIANTS if variant.name == "x86-64-v3")
    if this.machine != "x86_64" or shutil.which("c++") is None or not older.needs <= this.flags:
        pytest.skip("needs a C++ compiler and an x86 processor with AVX2")
    compiler, options = Compiler.find(), [f"-march={request.param}"]
    library = DEFAULT_CACHE_DIR / "native" / file_name("packed_linear", *compiler.command, *compiler.options, *options)
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not library.exists():
        compiler.compile(name_library("packed_linear"), options, library)
    share_openmp()
    return LinearKernel(ctypes.CDLL(str(library)))


def weight_of(kind: str, num_out: int, num_in: int) -> QuantizedWeight:
    """Return random weights, with the extreme integers among them."""
    bits = 4 if kind.startswith("int4") else 8
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (num_out, num_in)).to(torch.int8)
    values[::3] = -(1 << (bits - 1))
    group = GROUPS.get(kind, GROUP)
    scales = (torch.randn(num_out, -(-num_in // group) if group else 1) / 50).bfloat16().float()
    offsets = round_to_halves(torch.randn_like(scales) / 6) if kind == "int4 with offsets" else None
    return QuantizedWeight(values, scales, bits, group, offsets)


def inputs_of(num_rows: int, num_in: int) -> Tensor:
    x = torch.randn(num_rows, num_in) * 2.0 ** torch.randint(-8, 8, (num_rows, 1))
    x[-1] = x[-1].sign() * 3  # the largest integers only
    return x.bfloat16()


def slow_products(weight: QuantizedWeight, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return x W^T + bias in float64, and the sums of the terms' sizes."""
    inputs = rounded_inputs(x, weight.group or 64).double()
    whole = weight.dequantized(torch.float64)
    found, sizes = torch.empty(len(x), len(whole)).double(), torch.empty(len(x), len(whole)).double()
    for n, row in enumerate(inputs):
        for o, weights in enumerate(whole):
            terms = row * weights
            found[n, o], sizes[n, o] = terms.sum() + bias[o], terms.abs().sum() + bias[o].abs()
    return found, sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_products_equal_a_slow_loop(kind: str, seed: int, kernel: LinearKernel) -> None:
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    num_rows, num_in, num_out = (int(generator.integers(1, most)) for most in (64, 300, 70))
    weight, x, bias = weight_of(kind, num_out, num_in), inputs_of(num_rows, num_in), torch.randn(num_out)
    found = KernelLinear(kernel, weight, bias)(x).double()
    expected, sizes = slow_products(weight, x, bias)
    assert ((found - expected).abs() <= expected.abs() * 2**-8 + sizes * 2**-20).all()


def assert_same_integers(kind: str, found: Tensor, other: Tensor) -> None:
    """Check that two processors' products have the same integers; of many or cancelling sums a last bit may differ."""
    if kind in ("int8 in small groups", "int4 with offsets"):
        torch.testing.assert_close(found, other, rtol=2**-7, atol=float(found.abs().max()) * 2**-16)
    else:
        assert torch.equal(found, other), "a processor rounds another integer"


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_older_processors_compute_the_same_bits(kind: str, kernel: LinearKernel, other_kernel: LinearKernel) -> None:
    torch.manual_seed(0)
    for num_rows, num_in, num_out in ((1, 1, 1), (2, 31, 33), (3, 64, 32), (12, 65, 31), (13, 640, 100), (64, 129, 64)):
        weight, x = weight_of(kind, num_out, num_in), inputs_of(num_rows, num_in)
        found, other = (KernelLinear(each, weight, None)(x) for each in (kernel, other_kernel))
        assert_same_integers(kind, found, other)


def wide_layer(num_in: int, num_out: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return bfloat16 weights, float32 inputs and a bias."""
    torch.manual_seed(num_in)
    return torch.randn(num_out, num_in).bfloat16(), torch.randn(num_rows, num_in), torch.randn(num_out)


def assert_exact(found: Tensor, weight: Tensor, x: Tensor, bias: Tensor) -> None:
    """Check that nothing but the float32 sums is rounded."""
    expected = x.double() @ weight.double().T + bias
    sizes = x.double().abs() @ weight.double().abs().T + bias.abs()
    assert found.dtype == torch.float32 and ((found - expected).abs() <= sizes * 2**-22).all()


@pytest.mark.parametrize("shape", [(2, 1, 1), (40, 33, 2), (66, 32, 7), (130, 100, 8), (512, 70, 19)], ids=str)
@torch.inference_mode()
def test_products_of_float32_inputs_round_nothing_but_sums(
    shape: tuple[int, int, int], kernel: LinearKernel, other_kernel: LinearKernel
) -> None:
    weight, x, bias = wide_layer(*shape)
    for each in (kernel, other_kernel):
        layer = KernelLinear(each, weight, bias, torch.float32)
        y = layer(x)
        assert_exact(y, weight, x, bias)
        assert all(torch.equal(layer(row), whole) for row, whole in zip(x, y, strict=True)), "rows are independent"
        whole, parts = np.arange(1, len(x), dtype=np.int32), np.array([[0, 0]], np.int32)
        some = layer.some(x, whole, parts)
        assert torch.equal(some[1:], y[1:]) and torch.equal(some[0, :32], y[0, :32])
        assert (some[0, 32:] == -torch.inf).all()


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16", "float32"])
def test_the_rows_of_a_packed_weight_are_what_its_integers_stand_for(kind: str, kernel: LinearKernel) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    for num_out, num_in in ((1, 2), (33, 64), (70, 100)):
        weight = weight_of(kind, num_out, num_in) if kind in KINDS else torch.randn(num_out, num_in).bfloat16()
        outputs = torch.randint(num_out, (9,))
        found = KernelLinear(kernel, weight, None, dtype).rows(outputs)
        whole = weight.dequantized(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
        assert torch.equal(found, whole[outputs]) and found.dtype == dtype


def layer_of(kind: str, num_in: int, num_out: int, num_rows: int, kernel: LinearKernel) -> tuple[KernelLinear, Tensor]:
    """Return a layer and inputs. The exact products of bfloat16 are 0: only the order of the sums makes the results."""
    torch.manual_seed(0)
    if kind == "bfloat16":
        half, x = torch.randn(num_out, num_in // 2), torch.randn(num_rows, num_in // 2).repeat(1, 2).bfloat16()
        return KernelLinear(kernel, torch.cat([half, -half], dim=1).bfloat16(), None), x
    return KernelLinear(kernel, weight_of(kind, num_out, num_in), torch.randn(num_out)), inputs_of(num_rows, num_in)


# Tiles multiply 512 inputs of bfloat16, on processors that have them, and no 520.
LAYERS = pytest.mark.parametrize(
    ("kind", "num_in"), [("bfloat16", 512), ("bfloat16", 520), *itertools.product(KINDS, (96, 520))]
)


@LAYERS
@torch.inference_mode()
def test_a_row_does_not_depend_on_other_rows(kind: str, num_in: int, kernel: LinearKernel) -> None:
    layer, x = layer_of(kind, num_in, 70, 50, kernel)
    x[7, 30] = float("nan")
    y = layer(x)
    assert y[7].isnan().all() and y[8:].isfinite().all() and (y[8:] != 0).any()
    for number in (0, 6, 8, 12, 29, 49):
        for more in (*range(1, 15), 20):
            assert torch.equal(y[number], layer(x[number : number + more])[0])
    torch.set_num_threads(2)
    assert torch.equal(layer(x).nan_to_num(), y.nan_to_num())


@LAYERS
@torch.inference_mode()
def test_some_rows_and_panels_are_those_of_the_whole_product(kind: str, num_in: int, kernel: LinearKernel) -> None:
    layer, x = layer_of(kind, num_in, 100, 30, kernel)
    whole = np.array([28, *range(1, 27, 2)], np.int32)  # more than one group of rows
    parts = np.array([[panel, row] for panel in (0, 3) for row in (2, 29)], np.int32)
    y, expected = layer(x), torch.full((30, 100), -torch.inf).bfloat16()
    expected[whole] = y[whole]
    for row in (2, 29):
        expected[row, :32], expected[row, 96:] = y[row, :32], y[row, 96:]
    assert torch.equal(layer.some(x, whole, parts), expected)
    assert (layer.some(x, whole[:0], parts[:0]) == -torch.inf).all()


Run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Preparation(ctypes.Structure):
    """The struct `Preparation` of the sources."""

    _fields_ = (("run", Run), ("of", ctypes.c_void_p))


def multiply_prepared(
    layers: Sequence[KernelLinear],
    x: Tensor,
    outputs: Sequence[Tensor],
    num_threads: int,
    prepare: Callable[[], object],
) -> None:
    """Set the outputs by one call of the kernel, in which one thread calls `prepare` first."""
    library = load_library(LinearKernel.library_name, DEFAULT_CACHE_DIR)
    assert library is not None
    addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))
    places = (ctypes.c_void_p * len(layers))(*(y.data_ptr() for y in outputs))
    preparation = Preparation(run=Run(lambda _: prepare()), of=None)
    sizes = ctypes.c_int64(len(x)), places, ctypes.c_int32(num_threads), ctypes.byref(preparation)
    library.linears_bf16(addresses, ctypes.c_int64(len(layers)), ctypes.c_void_p(x.data_ptr()), *sizes)


@pytest.mark.parametrize("num_threads", [1, 2, 5, 65])
@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("kind", ["bfloat16", *KINDS])
@torch.inference_mode()
def test_threads_that_wait_for_inputs_multiply_those(
    kind: str, num_rows: int, num_threads: int, kernel: LinearKernel
) -> None:
    """Each fetches the first weights of its panels meanwhile, which are more or fewer than the threads."""
    for numbers_of_outputs in ((2400, 1300), (33,)):
        made = [layer_of(kind, 96, num_out, num_rows, kernel) for num_out in numbers_of_outputs]
        layers, given = [layer for layer, _ in made], made[0][1]
        expected, x = [layer(given) for layer in layers], torch.zeros_like(given)
        found = [torch.full_like(y, 7) for y in expected]

        def prepare(x: Tensor = x, given: Tensor = given) -> None:
            time.sleep(0.005)
            x.copy_(given)

        multiply_prepared(layers, x, found, num_threads, prepare)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@torch.inference_mode()
def test_the_panels_of_threads_that_are_missing_are_multiplied_too(kernel: LinearKernel) -> None:
    """Within the team of another call there is only one thread."""
    (layer, x), (outer, of_outer) = (layer_of("bfloat16", 96, num_out, 3, kernel) for num_out in (2400, 32))
    found, other = torch.full((3, 2400), 7).bfloat16(), torch.empty(3, 32).bfloat16()
    multiply_prepared([outer], of_outer, [other], 2, lambda: multiply_prepared([layer], x, [found], 5, lambda: None))
    assert torch.equal(found, layer(x)) and torch.equal(other, outer(of_outer))


def test_rounded_weights_change_the_products_little(kernel: LinearKernel) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(9, 256).bfloat16()
    exact = x.float() @ weight.T
    for bits, most in ((8, 0.02), (4, 0.15)):
        found = KernelLinear(kernel, quantize(weight, bits), None)(x).float()
        assert (found - exact).norm() < most * exact.norm()


@pytest.mark.parametrize("options", ["-march=armv8-a", "-march=armv8.2-a+dotprod"])
def test_arm_processors_compute_the_same_bits(options: str, kernel: LinearKernel, tmp_path: Path) -> None:
    """A program with the compiled functions runs under the emulator."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which(_ARM) is None or emulator is None:
        pytest.skip(f"needs {_ARM} and qemu-aarch64 (Debian packages g++-aarch64-linux-gnu and qemu-user)")
    main = tmp_path / "main.cpp"
    main.write_text(_PROGRAM.replace("SOURCE", str(name_library("packed_linear"))))
    built = [_ARM, "-O2", "-std=c++17", "-static", "-Wno-psabi", f"-I{FOLDER}", options, str(main), "-o"]
    subprocess.run([*built, str(tmp_path / "main")], check=True, timeout=120)

    def run(sent: bytes) -> bytearray:
        command = [emulator, str(tmp_path / "main")]
        return bytearray(subprocess.run(command, input=sent, capture_output=True, check=True, timeout=60).stdout)

    torch.manual_seed(0)
    for kind in KINDS:
        weight, x = weight_of(kind, 70, 100), inputs_of(5, 100)
        layer = KernelLinear(kernel, weight, None)
        halves, scales = weight.stored_scales()
        kinds = 0 if halves is None else len(halves)
        sizes = np.array([5, 100, 70, weight.bits, weight.group, kinds, layer._panels.nbytes], np.int64)
        parts = sizes, x.view(torch.int16).numpy(), weight.values.numpy(), scales.numpy()
        scale_bytes = b"" if halves is None else halves.numpy().tobytes()
        sent = b"".join(part.tobytes() for part in parts) + scale_bytes
        found = torch.frombuffer(run(sent), dtype=torch.bfloat16).view(5, 70)
        assert_same_integers(kind, found, layer(x))
    wide, inputs, bias = wide_layer(100, 70, 5)
    sizes = np.array([5, 100, 70, 16, 0, 0, 96 * 100 * 2], np.int64)
    sent = b"".join(part.numpy().tobytes() for part in (inputs, wide.view(torch.int16), bias))
    assert_exact(torch.frombuffer(run(sizes.tobytes() + sent), dtype=torch.float32).view(5, 70), wide, inputs, bias)


_PROGRAM = r"""
#include "SOURCE"
#include <cstdio>
template <class T> std::vector<T> read(int64_t num) {
  std::vector<T> values(num + 64);
  if (fread(values.data(), sizeof(T), num, stdin) != size_t(num)) exit(1);
  return values;
}
int main() {
  const auto sizes = read<int64_t>(7);
  const int64_t rows = sizes[0], in = sizes[1], out = sizes[2], group = sizes[4], kinds = sizes[5];
  std::vector<uint8_t> panels(sizes[6] + 64);
  if (sizes[3] == 16) {
    const auto x = read<float>(rows * in);
    const auto weights = read<uint16_t>(out * in);
    const auto bias = read<float>(out);
    pack_bf16(weights.data(), out, in, panels.data(), 1);
    const Linear layer{panels.data(), bias.data(), in, out, nullptr, 16, 0, 0};
    std::vector<float> y(rows * out);
    linear_f32(&layer, x.data(), nullptr, rows, y.data(), 1);
    return fwrite(y.data(), 4, y.size(), stdout) != y.size();
  }
  const auto x = read<uint16_t>(rows * in);
  const auto values = read<int8_t>(out * in);
  auto scales = read<float>(out);
  const auto halves = read<uint16_t>(group ? kinds * out * ((in + group - 1) / group) : 0);
  std::vector<float> bias(out + 64);
  pack_integers(values.data(), halves.data(), kinds, sizes[3], group ? group : 64, out, in, panels.data(), 1);
  const Linear layer{panels.data(), bias.data(), in, out, scales.data(), int32_t(sizes[3]), int32_t(group), kinds == 2};
  std::vector<uint16_t> y(rows * out);
  linear_bf16(&layer, x.data(), nullptr, rows, y.data(), 1);
  fwrite(y.data(), 2, y.size(), stdout);
}
"""
