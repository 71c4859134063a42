from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_worker.model.quantization import (
    GROUP,
    QuantizedLinear,
    QuantizedWeight,
    quantize,
    quantize_layers,
    round_to_halves,
    rounded_inputs,
)


@pytest.mark.parametrize("num_in", [1, 31, 64, 100])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_weight_is_within_half_a_step_of_the_weight(bits: int, num_in: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, num_in) * torch.rand(70, 1)
    weight[3] = 0
    found = quantize(weight, bits)
    assert found.values.int().abs().max() <= 1 << (bits - 1) and found.values.shape == weight.shape
    assert found.group == (GROUP if bits == 4 else 0)
    scales = found.scales.abs()
    steps = scales.repeat_interleave(GROUP, dim=1)[:, :num_in] if bits == 4 else scales.expand_as(weight)
    clipped = 0 if bits == 8 else 2.1 * steps  # 4 bits may clip the largest values of a group
    assert ((found.dequantized() - weight).abs() <= 0.51 * steps + clipped).all()
    assert (found.dequantized()[3] == 0).all()


def test_four_bits_choose_the_scale_with_the_least_error() -> None:
    weight = torch.randn(50, GROUP, generator=torch.Generator().manual_seed(0))
    found = quantize(weight, 4)
    furthest = weight.gather(1, weight.abs().argmax(dim=1, keepdim=True))
    plain = (furthest / -8).bfloat16().float()
    naive = (weight / plain).round().clamp(-8, 7) * plain
    assert (found.dequantized() - weight).norm() < (naive - weight).norm()


@pytest.mark.parametrize("num_in", [20, 64, 100])
@pytest.mark.parametrize(("bits", "group", "has_offsets"), [(8, 0, False), (8, 16, False), (4, GROUP, True)])
def test_a_weight_is_each_integer_times_its_scale_plus_its_offset(
    bits: int, group: int, has_offsets: bool, num_in: int
) -> None:
    most, num_groups = 1 << (bits - 1), -(-num_in // group) if group else 1
    values = torch.randint(-most, most, (150, num_in)).to(torch.int8)
    scales, offsets = torch.randn(2, 150, num_groups)
    weight = QuantizedWeight(values, scales, bits, group, offsets if has_offsets else None)
    expected = values * scales.repeat_interleave(group or num_in, dim=1)[:, :num_in]
    if has_offsets:
        expected += offsets.repeat_interleave(group, dim=1)[:, :num_in]
    assert torch.equal(weight.dequantized(), expected)
    assert torch.equal(weight.dequantized(torch.bfloat16), expected.bfloat16())


def test_stored_scales_are_exact_over_twenty_binades() -> None:
    scales, offsets = (torch.randint(-1024, 1024, (2, 8, 3)) / 1024) * 2.0 ** torch.randint(-60, -40, (2, 8, 3))
    weight = QuantizedWeight(torch.zeros(8, 96, dtype=torch.int8), scales, 4, GROUP, offsets)
    halves, factors = weight.stored_scales()
    assert halves is not None and torch.equal(halves.float() * factors[:, None], torch.stack([scales, offsets]))
    assert torch.equal(weight.dequantized(), offsets.repeat_interleave(GROUP, dim=1)), "the integers are 0"


def test_scales_of_groups_are_rounded_to_the_nearest_that_a_half_has() -> None:
    drawn, halfway = torch.randn(1000) * 2.0 ** torch.randint(-14, 15, (1000,)), torch.arange(2049.0, 4096.0)
    numbers = torch.cat([drawn, halfway, -halfway, torch.zeros(1)])
    numbers = numbers[(numbers == 0) | (numbers.abs() > 2.0**-14)]  # smaller halves have fewer bits
    assert torch.equal(round_to_halves(numbers), numbers.half().float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_only_the_block_of_a_number_that_is_not_finite_becomes_nan(value: float) -> None:
    x = torch.randn(2, 130).bfloat16()
    x[1, 70] = value
    found = rounded_inputs(x)
    assert found[1, 64:128].isnan().all() and found[0].isfinite().all() and found[1, 128:].isfinite().all()


def test_inputs_are_rounded_by_the_nearest_inverse_of_their_scale() -> None:
    """The kernel divides: 127 / 255 and 127 * (1 / 255) differ in the last bit, so 63.5 becomes 63 or 64."""
    found = rounded_inputs(torch.tensor([[255.0, 127.5]]).bfloat16(), 32)
    assert found[0, 1] / found[0, 0] == pytest.approx(63 / 127, rel=1e-6)


def test_rounded_inputs_are_at_most_half_a_step_away() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4, 200), torch.full((1, 200), 1e-39), torch.full((1, 200), 3e38)]).bfloat16()
    steps = x.float().abs().amax(dim=-1, keepdim=True) / 127
    assert ((rounded_inputs(x) - x.float()).abs() <= 0.502 * steps + 2.0**-106 * 127).all()


def test_layers_are_replaced_once_and_keep_their_biases() -> None:
    model = nn.ModuleDict({"inner": nn.ModuleDict({"one": nn.Linear(64, 8), "two": nn.Linear(8, 4)})}).bfloat16()
    bias = model.get_submodule("inner.one").bias
    quantize_layers(model, ["inner.one"], 8)
    first = model.get_submodule("inner.one")
    quantize_layers(model, ["inner.one", "inner.two"], 4)
    one, two = model.get_submodule("inner.one"), model.get_submodule("inner.two")
    assert isinstance(one, QuantizedLinear) and isinstance(two, QuantizedLinear)
    assert one is first and one.bias is bias and (one.quantized.bits, two.quantized.bits) == (8, 4)
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(one(x), nn.functional.linear(x, one.weight, bias), rtol=0.05, atol=0.05)
