from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

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
    # 4 bits may clip the largest values of a group. Their offsets are rounded too.
    further = 0 if bits == 8 else 2.1 * steps + 2**-11 * weight.abs()
    assert ((found.dequantized() - weight).abs() <= 0.51 * steps + further).all()
    assert (found.dequantized()[3] == 0).all()


def weights(kind: str, num_out: int, num_in: int) -> Tensor:
    """Return weights that are drawn in this way."""
    torch.manual_seed(0)
    if kind == "heavy tails":
        return torch.distributions.StudentT(3.0).sample((num_out, num_in))
    drawn = torch.randn(num_out, num_in)
    return {"normal": drawn, "one sign": drawn.abs() + 1, "a grid": (drawn * 4).round() / 4}[kind]


def squared_errors(weight: Tensor, found: Tensor) -> Tensor:
    """Return the sums of each group's squared errors."""
    return (found - weight).square().view(len(weight), -1, GROUP).sum(dim=2)


def symmetric_errors(weight: Tensor) -> Tensor:
    """Return each group's error without offsets: the value furthest from 0 becomes -8, or is clipped to it."""
    groups = weight.view(len(weight), -1, GROUP)
    furthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    tried = []
    for clip in (1.0, 0.95, 0.9, 0.85, 0.8):
        scales = round_to_halves(furthest * (-clip / 8))
        rounded = (groups / scales).round().clamp(-8, 7) * scales
        tried.append(squared_errors(weight, rounded.flatten(1)))
    return torch.stack(tried).amin(dim=0)


def best_by_search(groups: Tensor) -> Tensor:
    """Return the least squared error that a slow search over scales and offsets finds for each group (G, 32)."""
    lowest, highest = groups.aminmax(dim=1, keepdim=True)
    tried = []
    for low, high in itertools.product(torch.linspace(0, 0.25, 18), repeat=2):
        first, last = lowest + low * (highest - lowest), highest - high * (highest - lowest)
        scale = (last - first) / 15
        rounded = ((groups - first) / scale).round().clamp(0, 15) * scale + first
        tried.append((rounded - groups).square().sum(dim=1))
    return torch.stack(tried).amin(dim=0)


# The error over a grid of more than 16 numbers has narrow minima, at scales that are its step or a multiple of it.
# Symmetric rounding tries one for some groups, the search for more of them, and fits only come near.
@pytest.mark.parametrize(
    ("kind", "ratio_to_search"), [("normal", 1.05), ("heavy tails", 1.05), ("one sign", 1.05), ("a grid", 1.2)]
)
def test_four_bits_are_closer_than_without_offsets_and_nearly_the_closest(kind: str, ratio_to_search: float) -> None:
    weight = weights(kind, 40, 20 * GROUP)
    errors, symmetric = squared_errors(weight, quantize(weight, 4).dequantized()), symmetric_errors(weight)
    assert errors.sum() <= 0.9 * symmetric.sum()
    assert kind == "a grid" or (errors.sum(dim=1) <= symmetric.sum(dim=1)).all()
    groups = weight.view(-1, GROUP)[:30]
    assert errors.flatten()[:30].sum() <= ratio_to_search * best_by_search(groups).sum()


def test_errors_count_by_the_squares_of_the_inputs() -> None:
    weight = weights("normal", 40, 100)
    squares = torch.randn(100).mul(2).exp()
    found, equal = quantize(weight, 4, squares).dequantized(), quantize(weight, 4).dequantized()
    assert ((found - weight).square() @ squares).sum() < 0.6 * ((equal - weight).square() @ squares).sum()


@pytest.mark.parametrize("squares", [torch.zeros(64), torch.full((64,), torch.inf), torch.full((64,), 3.0)])
def test_errors_count_equally_if_the_squares_of_the_inputs_say_nothing(squares: Tensor) -> None:
    weight = weights("normal", 5, 64)
    assert torch.equal(quantize(weight, 4, squares).dequantized(), quantize(weight, 4).dequantized())


def test_four_bits_keep_groups_of_16_evenly_spaced_numbers() -> None:
    torch.manual_seed(0)
    steps, lowest = torch.rand(2, 50, 1) + 0.1
    levels = torch.rand(50, GROUP).argsort(dim=1) % 16
    weight = lowest - levels * steps
    torch.testing.assert_close(quantize(weight, 4).dequantized(), weight, rtol=0, atol=0.01)


def test_four_bits_have_scales_and_offsets_that_the_kernel_stores_exactly() -> None:
    found = quantize(weights("normal", 3, 70 * GROUP), 4)
    assert found.offsets is not None and found.scales.shape == found.offsets.shape == (3, 70)
    assert all(torch.equal(round_to_halves(part), part) for part in (found.scales, found.offsets))
    assert set(found.values.unique().tolist()) == set(range(-8, 8)), "all integers are used"


def test_every_output_is_rounded_as_if_it_were_the_only_one() -> None:
    """Groups are rounded in pieces of many, and so are outputs."""
    weight = weights("heavy tails", 4200, 33)
    found = quantize(weight, 4)
    for output in (0, 1, 1023, 1024, 2047, 4095, 4096, 4199):
        alone = quantize(weight[output : output + 1], 4)
        assert torch.equal(alone.dequantized()[0], found.dequantized()[output])


def test_groups_of_one_number_keep_it_and_those_that_are_not_finite_stay_so() -> None:
    weight = torch.tensor([0.0, 0.7, -3.0, float("nan"), float("inf")]).repeat_interleave(GROUP)[None]
    found = quantize(weight, 4).dequantized().view(5, GROUP)
    torch.testing.assert_close(found[:3], weight.view(5, GROUP)[:3], rtol=2**-11, atol=0)
    assert not found[3:].isfinite().any(), "the comparison at start notices them"


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
