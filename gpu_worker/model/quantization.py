"""Hold weights as integers with scales, and define what a layer of such weights computes.

Weights are symmetric: 8 bits with one scale per output, or 8 or 4 bits with one scale per output and group of inputs.
Those of 4 bits in groups may have offsets too, as those that `quantize` makes and the GGUF type Q4_K have. Each token's
inputs are rounded to 8-bit integers when they are multiplied, in blocks with one scale each: base models have single
inputs that are far larger than the others. `packed_linear.cpp` computes the same integers.

Dims: N tokens, I in, O out, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gpu_worker.bank.load_threads import load_executor

GROUP = 32  # inputs of an output that share a scale
SMALL_GROUP = 16  # in the GGUF type Q6_K
_BLOCK = 64  # inputs of a token that share a scale, if the weights have no groups
BITS = {"int8": 8, "int4": 4}  # by the setting's value
_LARGEST_INPUT = 127
_SMALLEST_RANGE = 2.0**-100  # inputs below it are rounded to 0
_ROWS_AT_ONCE = 4096  # bounds float32 copies of weights
_ROWS_IN_CACHE = 64  # their float32 copies stay in a processor's cache
_GROUPS_AT_ONCE = 2048  # their float32 copies stay in a processor's cache
_PARTS = (1.0, 0.92, 0.84)  # shares of a group's range; the first scales let 16 integers cover one of them
_NUM_FITS = 2  # of scale and offset to the integers, by least squares
_LEAST_SHARE = 1e-4  # of an input's mean square, in the mean of all inputs
_DROPPED_BITS = 13  # a float32 mantissa has 24 bits, that of a half 11
_HALF_EXPONENT = 14  # the largest scale that is stored as a half has it


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as integers: `values` (O, I) int8 of `bits` bits times `scales` (O, G) float32, plus `offsets` (O, G).

    `group`: inputs of an output that share a scale, 32 or 16. 0: all inputs, so G is 1. `offsets`: None are 0.
    """

    values: Tensor
    scales: Tensor
    bits: int
    group: int
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        forms = (8, 0, False), (8, GROUP, False), (8, SMALL_GROUP, False), (4, GROUP, False), (4, GROUP, True)
        form = self.bits, self.group, self.offsets is not None
        assert form in forms, f"there are no products of integers of the form {form}"

    @property
    def block(self) -> int:
        """Return the number of a token's inputs that share a scale."""
        return self.group or _BLOCK

    @property
    def scales_per_group(self) -> int:
        """Return 2 if a group has an offset besides its scale."""
        return 1 if self.offsets is None else 2

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the packed values and scales, without padding."""
        num_scales = self.scales.numel() * self.scales_per_group
        return self.values.numel() * self.bits // 8 + num_scales * (2 if self.group else 4)

    def rows(self, outputs: Tensor | slice) -> QuantizedWeight:  # (N,)
        """Return the weight of these outputs."""
        offsets = None if self.offsets is None else self.offsets[outputs]
        return replace(self, values=self.values[outputs], scales=self.scales[outputs], offsets=offsets)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (O, I) that the integers stand for."""
        num_out, num_in = self.values.shape
        size = self.group or num_in
        split = num_in - num_in % size  # the last group may have fewer inputs than the others
        pieces = [(slice(split), slice(split // size))] if split else []
        if split < num_in:
            pieces.append((slice(split, None), slice(split // size, None)))
        weight = torch.empty(num_out, num_in, dtype=dtype)
        for start in range(0, num_out, _ROWS_IN_CACHE):
            rows = slice(start, start + _ROWS_IN_CACHE)
            for inputs, groups in pieces:
                weight[rows, inputs] = self._multiply(rows, inputs, groups)
        return weight

    def _multiply(self, rows: slice, inputs: slice, groups: slice) -> Tensor:
        """Return these weights in float32. Each of the groups has the same number of inputs."""
        scales = self.scales[rows, groups]
        found = self.values[rows, inputs].float().reshape(*scales.shape, -1)
        found *= scales.unsqueeze(2)
        if self.offsets is not None:
            found += self.offsets[rows, groups].unsqueeze(2)
        return found.flatten(1)

    def stored_scales(self) -> tuple[Tensor | None, Tensor]:
        """Return the scales, and offsets if any, of groups as halves (1 or 2, O, G), and each output's factor (O,).

        Without groups there are no halves. A power of two moves them into the range of halves, which represent numbers
        of 11 bits exactly.
        """
        if not self.group:
            return None, self.scales[:, 0].contiguous()
        exact = self.scales[None] if self.offsets is None else torch.stack([self.scales, self.offsets])
        lowest, highest = map(float, exact.aminmax())
        largest = max(-lowest, highest, torch.finfo(torch.float32).tiny)
        exponent = int(torch.tensor(largest).frexp().exponent) - _HALF_EXPONENT
        halves = torch.ldexp(exact, torch.tensor(-exponent)).half()
        return halves, torch.full((len(self.scales),), 2.0**exponent)


class QuantizedLinear(nn.Linear):
    """A linear layer with integer weights, computed slowly: the reference of the compiled products.

    It works like any other layer until it is packed. `dtype`: that of `weight`.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # torch declares it as always there

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.values.shape
        self.quantized, self.dtype = quantized, dtype
        self.bias = bias
        self._kept: Tensor | None = None
        # transformers asks the first parameter for the model's dtype and device, and a model may have no other.
        self.empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # no parameter: most starts do without it
        """Return the weights that the integers stand for, in a new tensor each time, which takes time and memory."""
        return self.quantized.dequantized(self.dtype)

    def keep_weight(self) -> None:
        """Keep the weights that the integers stand for too, for steps that no compiled kernel computes."""
        self._kept = self.weight

    def forward(self, input: Tensor) -> Tensor:  # (..., I) -> (..., O)
        rounded = rounded_inputs(input, self.quantized.block)
        weight = self.weight if self._kept is None else self._kept
        return nn.functional.linear(rounded.to(input.dtype), weight, self.bias)

    def rows(self, outputs: Tensor) -> Tensor:  # (N,) -> (N, I)
        """Return the weights of these outputs."""
        return self.quantized.rows(outputs).dequantized(self.dtype)


def rounded_inputs(x: Tensor, block: int = _BLOCK) -> Tensor:
    """Return x (..., I) in float32, with each block of inputs rounded to 8-bit integers of one scale.

    Blocks that are not finite become NaN. The inverse of a scale has 16 bits, so that its products with bfloat16
    numbers are exact on every processor.
    """
    padded = nn.functional.pad(x.float(), (0, -x.shape[-1] % block))
    values = padded.view(*padded.shape[:-1], -1, block)
    largest = values.abs().amax(dim=-1, keepdim=True)
    # a number divided by a tensor would be multiplied by its reciprocal, which the kernel does not do
    exact = torch.full_like(largest, _LARGEST_INPUT) / largest.clamp(min=_SMALLEST_RANGE)
    inverse = (exact.contiguous().view(torch.int32) & ~0xFF).view(torch.float32)
    rounded = (values * inverse).round_() * (1 / inverse)
    return torch.where(largest.isfinite(), rounded, torch.nan).flatten(-2)[..., : x.shape[-1]]


@torch.inference_mode()
def quantize(weight: Tensor, bits: int, input_squares: Tensor | None = None) -> QuantizedWeight:
    """Round a weight (O, I) to 8 bits per output, or to 4 bits in groups of inputs with offsets.

    `input_squares` (I,): sums of the squares of each input, by which the errors of 4 bits count. None: all are equal.
    """
    shares = _error_shares(weight.shape[1], input_squares)
    round_rows = partial(_round_groups, shares=shares) if bits == 4 else _round_outputs
    num_threads = torch.get_num_threads()
    parts = torch.split(weight.detach(), -(-min(len(weight), _ROWS_AT_ONCE) // num_threads))
    # Each thread rounds rows of its own. Within the many small operations threads would wait for each other.
    with load_executor(num_threads) as executor:
        found = list(executor.map(round_rows, parts))
    values, scales, *offsets = (torch.cat(parts) for parts in zip(*found, strict=True))
    return QuantizedWeight(values, scales, bits, GROUP if bits == 4 else 0, *offsets)


def round_to_halves(numbers: Tensor) -> Tensor:
    """Return the nearest numbers of 11 bits, as halves have: the kernel stores scales and offsets of groups so."""
    bits = numbers.contiguous().view(torch.int32)
    rounded = (bits >> _DROPPED_BITS).bitwise_and_(1)  # a number halfway between two is rounded to the even one
    half = (1 << (_DROPPED_BITS - 1)) - 1
    return rounded.add_(bits).add_(half).bitwise_and_(-(1 << _DROPPED_BITS)).view(torch.float32)


@torch.inference_mode()
def _round_outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers of 8 bits (O, I) and their scales (O, 1)."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    return _divide(weight, scales).round_().to(torch.int8), scales


def _error_shares(num_in: int, input_squares: Tensor | None) -> Tensor:
    """Return the shares (32, G) that the inputs of each group have in its error. Each group's sum is 1."""
    squares = torch.ones(num_in) if input_squares is None else input_squares
    squares = squares.clamp(min=float(squares.mean()) * _LEAST_SHARE)
    if not (squares.isfinite().all() and squares.all()):
        squares = torch.ones(num_in)
    groups = nn.functional.pad(squares, (0, -num_in % GROUP)).view(-1, GROUP).T
    return groups / groups.sum(dim=0)


@torch.inference_mode()
def _round_groups(weight: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the integers of 4 bits (O, I), and the scales and offsets of their groups (O, G)."""
    num_out, num_in = weight.shape
    groups = nn.functional.pad(weight.float(), (0, -num_in % GROUP)).view(-1, GROUP)
    values, scales, offsets = torch.empty_like(groups, dtype=torch.int8), *torch.empty(2, len(groups))
    for start in range(0, len(groups), _GROUPS_AT_ONCE):
        part = slice(start, start + _GROUPS_AT_ONCE)
        columns = groups[part].T.contiguous()  # whole vectors are added for the sums over groups
        places = torch.arange(start, start + columns.shape[1]) % shares.shape[1]
        scales[part], offsets[part] = _fit_groups(columns, shares[:, places])
        values[part] = _nearest(columns, scales[part], offsets[part]).T
    values = values.view(num_out, -1)[:, :num_in].contiguous()
    return values, scales.view(num_out, -1), offsets.view(num_out, -1)


def _fit_groups(groups: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return a scale and an offset for each of the groups (32, G), chosen for a small error.

    The integers first cover the best part of the group's range. Then scale and offset are fitted to them.
    `shares` (32, G): of each squared error.
    """
    lowest, highest = torch.aminmax(groups, dim=0)
    best = torch.empty(0)
    for part in _PARTS:
        scales = (highest - lowest) * (part / 15)
        best = _better(groups, shares, best, scales, (highest + lowest + scales) / 2)
    mean = (groups * shares).sum(dim=0)
    for _ in range(_NUM_FITS):
        values = _nearest(groups, best[0], best[1])
        centre = (values * shares).sum(dim=0)
        values -= centre
        weighted = values * shares
        scales = _divide((weighted * groups).sum(dim=0), (weighted * values).sum(dim=0))
        best = _better(groups, shares, best, scales, mean - scales * centre)
    return best[0], best[1]


def _better(groups: Tensor, shares: Tensor, best: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Return scales, offsets and errors (3, G): of each group `best` or, with a smaller error, the new ones.

    `best`: as returned, or empty. Scales and offsets are rounded as the kernel stores them.
    """
    scales, offsets = round_to_halves(scales), round_to_halves(offsets)
    values = _nearest(groups, scales, offsets)
    errors = values.mul_(scales).add_(offsets).sub_(groups).square_().mul_(shares).sum(dim=0)
    found = torch.stack([scales, offsets, errors])
    return torch.where(errors < best[2], found, best) if len(best) else found


def _nearest(groups: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    return _divide(groups - offsets, scales).round_().clamp_(-8, 7)


def _divide(weight: Tensor, scales: Tensor) -> Tensor:
    """Return weight / scales, and the weight where the scale is 0."""
    return weight / scales.where(scales != 0, 1)


def quantize_layers(
    model: nn.Module, names: Iterable[str], bits: int, input_squares: Mapping[str, Tensor] | None = None
) -> None:
    """Replace these linear layers of the model by layers of integer weights, except those that are such layers.

    `input_squares`: of each layer, as `quantize` expects them.
    """
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is not a linear layer"
        if not isinstance(linear, QuantizedLinear):
            squares = None if input_squares is None else input_squares.get(name)
            replace_layer(model, name, quantize(linear.weight, bits, squares))


def replace_layer(model: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    """Replace the linear layer of this name by one of integer weights."""
    parent_name, _, leaf = name.rpartition(".")
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is not a linear layer"
    setattr(model.get_submodule(parent_name), leaf, QuantizedLinear(quantized, linear.bias, linear.weight.dtype))
