"""Compute all decoder layers of a step in one call of `decoder_layer.cpp`, where the kernel computes each of them.

A decode step of one row takes some ten milliseconds. One of them is Python's between the layers, whose weights evict
its data from the processor's caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import AttentionPlan
from gpu_worker.model.grouped_mapping import GroupedMapping
from gpu_worker.model.packed_attention import unknown_arguments
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.attention_cpu import HostAttention
from gpu_worker.native.attention.decode_attention import Cache, make_cache_struct
from gpu_worker.native.compiled_layer import CompiledLayer, LayerKernel

_PROBE_TOKENS = 5
_POSITIONS, _HIDDEN = object(), object()  # places of tensors among the arguments of a call


@dataclass(frozen=True, slots=True)
class _RotaryCall:
    """A call of the module that computes the angles. `_POSITIONS` and `_HIDDEN` stand for the step's own tensors."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, rotary: nn.Module, hidden: Tensor, positions: Tensor) -> Any:
        given = {_POSITIONS: positions, _HIDDEN: hidden}
        options = {name: given.get(value, value) for name, value in self.options.items()}
        return rotary(*(given.get(value, value) for value in self.arguments), **options)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What a decoder does besides its layers: embed the tokens, compute angles, normalise the last layer's output.

    `angles`: the index of each layer's angles among those of `calls`. `output`: makes the result of the decoder.
    """

    embed: nn.Module
    rotary: nn.Module
    norm: nn.Module
    calls: tuple[_RotaryCall, ...]
    angles: tuple[int, ...]
    output: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Table:
    """The arguments of the layers' calls, but for the addresses of the step.

    `kinds` (L,): of each layer, the place in `firsts` of a layer with the same struct of the step.
    """

    keys: object  # the list of keys of the cache that this table is for
    caches: list[Cache]  # one struct for each layer; `calls` has their addresses
    calls: NDArray[np.int64]  # (L, 3)
    kinds: NDArray[np.int64]
    firsts: tuple[int, ...]


class CompiledDecoder:
    """The `forward` of a decoder: one call of the kernel for steps that it computes, else the decoder's own."""

    def __init__(self, own: nn.Module, layers: nn.ModuleList, recipe: _Recipe, kernel: LayerKernel) -> None:
        self._own: Callable[..., Any] = own.forward
        self._layers = [cast("CompiledLayer", layer.forward) for layer in layers]
        self._recipe, self._kernel = recipe, kernel
        inner = [module for layer in layers for module in layer.modules()]
        self._hooks = [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._table: _Table | None = None

    def __call__(self, *arguments: Any, **others: Any) -> Any:
        output = None if arguments else self._compiled(others)
        return self._own(*arguments, **others) if output is None else output

    def _compiled(self, others: dict[str, Any]) -> Any:
        """Return the decoder's output, or None if the kernel cannot compute this step."""
        context, positions = others.get("step"), others.get("position_ids")
        if not isinstance(context, StepContext) or unknown_arguments(others) != ["input_ids", "step"]:
            return None
        if positions is None or others.get("is_causal") is False:
            return None
        if not isinstance(context.composition, GroupedMapping | None):
            return None
        attention = context.attention
        if not isinstance(attention, HostAttention) or not attention.is_compiled or any(self._hooks):
            return None
        table = self._find_table(attention)
        if table is None:
            return None
        recipe = self._recipe
        x = recipe.embed(others["input_ids"])
        if x.shape != (1, len(attention.token_positions), self._layers[0].width) or not x.is_contiguous():
            return None
        angles = [call(recipe.rotary, x, positions) for call in recipe.calls]
        steps = []
        for place in table.firsts:
            layer = self._layers[place]
            step = layer.steps.address(context, attention, angles[recipe.angles[place]], layer.index, layer.shape)
            if step is None:
                return None
            steps.append(step)
        table.calls[:, 1] = np.array(steps)[table.kinds]
        for layer in self._layers:
            context.plan_attention(layer.index)
        y = torch.empty_like(x)
        self._kernel.layers(table.calls, x, y)
        return recipe.output(last_hidden_state=recipe.norm(y))

    def _find_table(self, attention: HostAttention) -> _Table | None:
        """Return the table for this cache, or None if a layer cannot read it."""
        if self._table is not None and self._table.keys is attention.keys:
            return self._table
        calls, kinds, firsts = np.zeros((len(self._layers), 3), np.int64), list[int](), dict[object, int]()
        caches = list[Cache]()
        for place, layer in enumerate(self._layers):
            keys, values = attention.keys[layer.index], attention.values[layer.index]
            if layer.cache_address(keys, values) is None:
                return None
            caches.append(make_cache_struct(keys, values))
            calls[place] = layer.address, 0, ctypes.addressof(caches[-1])
            kind = id(attention.groups[layer.index]), self._recipe.angles[place], layer.shape
            kinds.append(list(firsts).index(kind) if kind in firsts else len(firsts))
            firsts.setdefault(kind, place)
        self._table = _Table(attention.keys, caches, calls, np.array(kinds), tuple(firsts.values()))
        return self._table


@torch.inference_mode()
def compile_decoders(model: nn.Module, kernel: LayerKernel) -> int:
    """Let the kernel compute, in place, all layers of each decoder that does nothing else between them.

    That is seen in a call with layers of random output. Parts that are replaced later are not noticed. Return the
    number of such decoders.
    """
    found = []
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and all(_is_compiled(layer) for layer in layers):
            recipe = _record(module, layers)
            if recipe is not None:
                found.append((module, layers, recipe))
    for module, layers, recipe in found:
        module.forward = CompiledDecoder(module, layers, recipe, kernel)
    return len(found)


def _is_compiled(layer: nn.Module) -> bool:
    return isinstance(layer.forward, CompiledLayer)


class _Unplanned(AttentionPlan):
    """The plan of a step in which no layer attends."""

    def attend(self, layer: int, *_: Any, **__: Any) -> Tensor:
        raise BaseModelUnsupported(f"layer {layer} attends")


def _record(decoder: Any, layers: nn.ModuleList) -> _Recipe | None:
    """Return the recipe of a decoder that is known to do what it says, else None."""
    parts = [getattr(decoder, name, None) for name in ("embed_tokens", "rotary_emb", "norm")]
    if not all(isinstance(part, nn.Module) for part in parts):
        return None
    embed, rotary, norm = (cast("nn.Module", part) for part in parts)
    ids, positions = torch.arange(_PROBE_TOKENS)[None], torch.arange(3, 3 + _PROBE_TOKENS)[None]
    step = StepContext()
    step.fill(None, _Unplanned())
    hidden = embed(ids)
    if hidden.dtype != torch.bfloat16:
        return None
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(hidden.shape, generator=generator).to(hidden.dtype) for _ in layers]
    inputs, seen = list[tuple[Tensor, dict[str, Any]]](), list[tuple[tuple[Any, ...], dict[str, Any], Any]]()

    def compute_layer(place: int, x: Tensor, **others: Any) -> Tensor:
        inputs.append((x, others))
        return outputs[place]

    own_rotary = rotary.forward

    def compute_angles(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments, options, own_rotary(*arguments, **options)))
        return seen[-1][2]

    computed = [(layer, partial(compute_layer, place)) for place, layer in enumerate(layers)]
    with _replaced([*computed, (rotary, compute_angles)]):
        try:
            output = decoder(input_ids=ids, position_ids=positions, use_cache=False, step=step)
        except (AssertionError, AttributeError, BaseModelUnsupported, LookupError, RuntimeError, TypeError, ValueError):
            return None
    if len(inputs) != len(layers) or not _is_chain(hidden, outputs, [x for x, _ in inputs]):
        return None
    if not _is_same(getattr(output, "last_hidden_state", None), norm(outputs[-1])):
        return None
    angles = []
    for _, others in inputs:
        made = [place for place, call in enumerate(seen) if call[2] is others.get("position_embeddings")]
        if not made or unknown_arguments(others) != ["position_embeddings", "step"]:
            return None
        if any(part.dtype != torch.bfloat16 for part in seen[made[0]][2]):
            return None
        angles.append(made[0])
    calls = list[_RotaryCall]()
    for arguments, options, _ in seen:
        call = _make_call(arguments, options, hidden, positions)
        if call is None:
            return None
        calls.append(call)
    return _Recipe(embed, rotary, norm, tuple(calls), tuple(angles), type(output))


@contextmanager
def _replaced(forwards: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Let these modules compute something else within the block."""
    own = [(module, vars(module).get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, before in own:
            del module.forward
            if before is not None:
                module.forward = before


def _is_chain(hidden: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> bool:
    """Return whether the first layer reads `hidden`, and each other one the output of the layer before it."""
    expected = [hidden, *outputs[:-1]]
    return all(_is_same(x, y) for x, y in zip(inputs, expected, strict=True))


def _is_same(x: Any, y: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)


def _make_call(
    arguments: tuple[Any, ...], options: dict[str, Any], hidden: Tensor, positions: Tensor
) -> _RotaryCall | None:
    """Return the call with places for the step's tensors, or None if it has others."""
    values = [_placed(value, hidden, positions) for value in (*arguments, *options.values())]
    if any(not isinstance(value, str | None) and value not in (_HIDDEN, _POSITIONS) for value in values):
        return None  # a number could be that of the tokens
    num = len(arguments)
    return _RotaryCall(tuple(values[:num]), dict(zip(options, values[num:], strict=True)))


def _placed(value: Any, hidden: Tensor, positions: Tensor) -> Any:
    for tensor, place in ((hidden, _HIDDEN), (positions, _POSITIONS)):
        if _is_same(value, tensor):
            return place
    return value
