"""Hold weights as integers with scales, and define what a layer of such weights computes.

Weights are symmetric: 8 bits with one scale per output, or 8 or 4 bits with one scale per output and group of inputs.
Each token's inputs are rounded to 8-bit integers when they are multiplied, in blocks with one scale each: base models
have single inputs that are far larger than the others. `packed_linear.cpp` computes the same integers.

Dims: N tokens, I in, O out, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUP = 32  # inputs of an output that share a scale
_BLOCK = 64  # inputs of a token that share a scale, if the weights have no groups
BITS = {"int8": 8, "int4": 4}  # by the setting's value
_LARGEST_INPUT = 127
_SMALLEST_RANGE = 2.0**-100  # inputs below it are rounded to 0
_ROWS_AT_ONCE = 4096  # bounds float32 copies of weights
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a group's largest value that 4 bits may clip to
_HALF_EXPONENT = 14  # the largest scale that is stored as a half has it


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as integers: `values` (O, I) int8 of `bits` bits, and `scales` (O, G) float32; G is 1 without groups."""

    values: Tensor
    scales: Tensor
    bits: int
    has_groups: bool

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the packed values and scales, without padding."""
        return self.values.numel() * self.bits // 8 + self.scales.numel() * (2 if self.has_groups else 4)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (O, I) that the integers stand for."""
        whole = torch.empty(self.values.shape, dtype=dtype)
        for start in range(0, len(whole), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            scales = self.scales[part]
            if self.has_groups:
                scales = scales.repeat_interleave(GROUP, dim=1)[:, : self.values.shape[1]]
            whole[part] = self.values[part] * scales
        return whole

    def stored_scales(self) -> tuple[Tensor | None, Tensor]:
        """Return the groups' scales (O, G) as halves, or None, and each output's factor (O,) float32.

        A power of two moves the groups' scales into the range of halves, which represent scales of 11 bits exactly.
        """
        if not self.has_groups:
            return None, self.scales[:, 0].contiguous()
        largest = max(float(self.scales.abs().max()), torch.finfo(torch.float32).tiny)
        exponent = int(torch.tensor(largest).frexp().exponent) - _HALF_EXPONENT
        halves = torch.ldexp(self.scales, torch.tensor(-exponent)).half()
        return halves.contiguous(), torch.full((len(self.scales),), 2.0**exponent)


class QuantizedLinear(nn.Linear):
    """A linear layer with integer weights, computed slowly: the reference of the compiled products.

    `weight`: the weights that the integers stand for, so that the layer works like any other until it is packed.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # torch declares it as always there

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.values.shape
        self.quantized = quantized
        self.weight = nn.Parameter(quantized.dequantized(dtype), requires_grad=False)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:  # (..., I) -> (..., O)
        rounded = rounded_inputs(input, GROUP if self.quantized.has_groups else _BLOCK)
        return nn.functional.linear(rounded.to(input.dtype), self.weight, self.bias)


def rounded_inputs(x: Tensor, block: int = _BLOCK) -> Tensor:
    """Return x (..., I) in float32, with each block of inputs rounded to 8-bit integers of one scale.

    Blocks that are not finite become NaN. The inverse of a scale has 16 bits, so that its products with bfloat16
    numbers are exact on every processor.
    """
    padded = nn.functional.pad(x.float(), (0, -x.shape[-1] % block))
    values = padded.view(*padded.shape[:-1], -1, block)
    largest = values.abs().amax(dim=-1, keepdim=True)
    exact = _LARGEST_INPUT / largest.clamp(min=_SMALLEST_RANGE)
    inverse = (exact.contiguous().view(torch.int32) & ~0xFF).view(torch.float32)
    rounded = (values * inverse).round_() * (1 / inverse)
    return torch.where(largest.isfinite(), rounded, torch.nan).flatten(-2)[..., : x.shape[-1]]


@torch.inference_mode()
def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """Round a weight (O, I) to 8 bits per output, or to 4 bits in groups of inputs."""
    found = [_quantize_rows(part.float(), bits) for part in torch.split(weight.detach(), _ROWS_AT_ONCE)]
    values, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return QuantizedWeight(values, scales, bits, has_groups=bits == 4)


def _quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if bits == 8:
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        return _divided(weight, scales).round_().to(torch.int8), scales
    num_out, num_in = weight.shape
    groups = nn.functional.pad(weight, (0, -num_in % GROUP)).view(num_out, -1, GROUP)
    furthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    best, least = torch.empty(0), torch.empty(0)
    for clip in _CLIPS:  # the value that is furthest from 0 becomes -8, or is clipped to it
        scales = (furthest * (-clip / 8)).bfloat16().float()
        error = (groups - _nearest(groups, scales) * scales).square_().sum(dim=2, keepdim=True)
        best = scales if clip == 1 else torch.where(error < least, scales, best)
        least = error if clip == 1 else torch.minimum(error, least)
    values = _nearest(groups, best).to(torch.int8).view(num_out, -1)[:, :num_in].contiguous()
    return values, best[:, :, 0].contiguous()


def _nearest(groups: Tensor, scales: Tensor) -> Tensor:
    return _divided(groups, scales).round_().clamp_(-8, 7)


def _divided(weight: Tensor, scales: Tensor) -> Tensor:
    return weight / scales.where(scales != 0, 1)


def quantize_layers(model: nn.Module, names: Iterable[str], bits: int) -> None:
    """Replace these linear layers of the model by layers of integer weights, except those that are such layers."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is not a linear layer"
        if not isinstance(linear, QuantizedLinear):
            replace_layer(model, name, quantize(linear.weight, bits))


def replace_layer(model: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    """Replace the linear layer of this name by one of integer weights."""
    parent_name, _, leaf = name.rpartition(".")
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is not a linear layer"
    setattr(model.get_submodule(parent_name), leaf, QuantizedLinear(quantized, linear.bias, linear.weight.dtype))


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    """Yield the model's layers of integer weights."""
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))
