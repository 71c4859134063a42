"""Compute a decoder in one call of `decoder_layer.cpp`, where the kernel computes each of its layers.

A decode step of one row takes some ten milliseconds. Without this, Python takes about two of them, because the
layers' weights evict its data from the processor's caches.

Dims: N tokens, H hidden size, L layers, P positions, A angles of a token.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import AttentionPlan
from gpu_worker.model.embedding import LookupEmbedding
from gpu_worker.model.grouped_mapping import GroupedMapping
from gpu_worker.model.packed_attention import unknown_arguments
from gpu_worker.model.packed_linear import KernelLinear
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.attention_cpu import HostAttention
from gpu_worker.native.attention.decode_attention import Cache, make_cache_struct
from gpu_worker.native.compiled_layer import CompiledLayer, LayerKernel
from gpu_worker.native.fused import FusedRmsNorm, Norm

_PROBE_TOKENS, _PROBE_IDS = 5, 64
_FAR = 1 << 24  # a position beyond every model's context
_FEWEST_KEPT, _MOST_KEPT = 1 << 10, 1 << 15  # positions
_NO_SUCH_ID, _NO_SUCH_POSITION = 1, 2  # results of the kernel
# What a model's code may raise on parts that stand for its own.
PROBE_ERRORS = AssertionError, AttributeError, BaseModelUnsupported, LookupError, RuntimeError, TypeError, ValueError
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
class _Embedding:
    """The rows (ids, H) of an embedding, as a packed layer or a plain matrix, and the number they are multiplied by."""

    rows: KernelLinear | Tensor
    num_ids: int
    width: int
    scale: float


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What a decoder does besides its layers: embed the tokens, compute angles, normalise the last layer's output.

    `angles`: the index of each layer's angles among those of `calls`. `keeps_angles`: whether those of a token depend
    on its position only. `output`: makes the result of the decoder.
    """

    embedding: _Embedding
    rotary: nn.Module
    norm: FusedRmsNorm
    calls: tuple[_RotaryCall, ...]
    angles: tuple[int, ...]
    keeps_angles: bool
    output: Callable[..., Any]


class _AngleTable(ctypes.Structure):
    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("width", c_int64))


class _Decoder(ctypes.Structure):
    _fields_ = (
        *(("packed_embedding", c_void_p), ("embedding", c_void_p), ("num_ids", c_int64), ("width", c_int64)),
        *(("scale", c_float), ("tables", c_void_p), ("num_tables", c_int64), ("num_positions", c_int64)),
        ("norm", Norm),
    )


class _Angles:
    """The angles of a step's tokens, and those of the first positions if a token's depend on its position only."""

    def __init__(self, recipe: _Recipe) -> None:
        self._recipe = recipe
        self.num_kept = 0
        self._kept = list[tuple[Tensor, Tensor]]()  # cos (P, A) and sin (P, A) for each call of the recipe
        self.tables = (_AngleTable * len(recipe.calls))()
        self.of_step, self._parts = torch.empty(0, dtype=torch.bfloat16), list[tuple[Tensor, Tensor]]()
        found = self._compute(torch.zeros(1, 1, dtype=torch.long))
        self._widths = [cos.shape[2] for cos, _ in found]
        self.keep(_FEWEST_KEPT)

    def keep(self, num_positions: int) -> bool:
        """Compute and keep the angles of the first `num_positions` positions. Return False if that is not possible."""
        if not self._recipe.keeps_angles or not self.num_kept < num_positions <= _MOST_KEPT:
            return False
        num_kept = max(1 << (num_positions - 1).bit_length(), _FEWEST_KEPT)
        found = self._compute(torch.arange(num_kept)[None])
        self._kept, self.num_kept = [(cos[0].contiguous(), sin[0].contiguous()) for cos, sin in found], num_kept
        for table, (cos, sin) in zip(self.tables, self._kept, strict=True):
            table.cos, table.sin, table.width = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        return True

    def parts(self, num_tokens: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the places in `of_step` of each call's cos and sin (1, N, A)."""
        if not self._parts or self._parts[0][0].shape[1] != num_tokens:
            counts = [num_tokens * width for width in self._widths for _ in range(2)]
            self.of_step = torch.empty(sum(counts), dtype=torch.bfloat16)
            halves = iter(part.view(1, num_tokens, -1) for part in torch.split(self.of_step, counts))
            self._parts = list(zip(halves, halves, strict=True))
        return self._parts

    def set(self, positions: Tensor) -> None:
        """Compute the angles of these positions (1, N) for the step, without keeping them."""
        for parts, found in zip(self._parts, self._compute(positions), strict=True):
            for part, values in zip(parts, found, strict=True):
                part.copy_(values)

    def _compute(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        hidden = torch.zeros(1, 1, self._recipe.embedding.width, dtype=torch.bfloat16)
        return [call(self._recipe.rotary, hidden, positions) for call in self._recipe.calls]


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
        self.make_output = recipe.output
        embedding = recipe.embedding
        # The embedding may read the weight of the output head, whose hooks do not concern the decoder.
        inner = [module for module in own.modules() if module is not own and module is not embedding.rows]
        self._hooks = [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._table: _Table | None = None
        self._angles = _Angles(recipe)
        is_packed = isinstance(embedding.rows, KernelLinear)
        self._struct = _Decoder(
            packed_embedding=cast("KernelLinear", embedding.rows).address if is_packed else None,
            embedding=None if is_packed else cast("Tensor", embedding.rows).data_ptr(),
            num_ids=embedding.num_ids,
            width=embedding.width,
            scale=embedding.scale,
            tables=ctypes.addressof(self._angles.tables),
            num_tables=len(recipe.calls),
            num_positions=self._angles.num_kept,
            norm=recipe.norm.struct,
        )

    @property
    def width(self) -> int:
        """Return the hidden size."""
        return self._recipe.embedding.width

    @property
    def num_ids(self) -> int:
        """Return the number of token ids."""
        return self._recipe.embedding.num_ids

    def __call__(self, *arguments: Any, **others: Any) -> Any:
        hidden = None if arguments else self.hidden(others)
        return self._own(*arguments, **others) if hidden is None else self.make_output(last_hidden_state=hidden)

    def hidden(self, others: dict[str, Any]) -> Tensor | None:
        """Return the decoder's output (1, N, H), or None if the kernel cannot compute this step.

        Raises: IndexError for a token that the embedding lacks.
        """
        context, ids, positions = others.get("step"), others.get("input_ids"), others.get("position_ids")
        if not isinstance(context, StepContext) or unknown_arguments(others) != ["input_ids", "step"]:
            return None
        if others.get("is_causal") is False or not isinstance(context.composition, GroupedMapping | None):
            return None
        attention = context.attention
        if not isinstance(attention, HostAttention) or not attention.is_compiled or any(self._hooks):
            return None
        num_tokens = len(attention.token_positions)
        if not (_is_readable(ids, num_tokens) and _is_readable(positions, num_tokens)):
            return None
        table = self._find_table(attention)
        if table is None:
            return None
        angles, steps = self._angles.parts(num_tokens), []
        for place in table.firsts:
            layer = self._layers[place]
            of_layer = angles[self._recipe.angles[place]]
            step = layer.steps.address(context, attention, of_layer, layer.index, layer.shape)
            if step is None:
                return None
            steps.append(step)
        table.calls[:, 1] = np.array(steps)[table.kinds]
        for layer in self._layers:
            context.plan_attention(layer.index)
        y = torch.empty(1, num_tokens, self._recipe.embedding.width, dtype=torch.bfloat16)
        self._compute(ids, positions, table.calls, y)
        return y

    def _compute(self, ids: Tensor, positions: Tensor, calls: NDArray[np.int64], y: Tensor) -> None:
        """Set y (1, N, H) to the decoder's output. Raises: IndexError."""
        decoder, angles = ctypes.addressof(self._struct), self._angles
        code = self._kernel.decoder(decoder, ids, positions, angles.of_step, calls, y)
        if code == _NO_SUCH_POSITION:
            kept: Tensor | None = positions
            if angles.keep(int(positions.max()) + 1):
                self._struct.num_positions = angles.num_kept
            else:
                angles.set(positions)
                kept = None
            code = self._kernel.decoder(decoder, ids, kept, angles.of_step, calls, y)
        if code == _NO_SUCH_ID:
            raise IndexError(f"a token's id is not below {self._recipe.embedding.num_ids}, or negative")

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
    """Let the kernel compute, in place, each decoder that only embeds tokens, calls its layers and normalises.

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
    embed, rotary, norm = (getattr(decoder, name, None) for name in ("embed_tokens", "rotary_emb", "norm"))
    embedding = _read_embedding(embed)
    if embed is None or embedding is None or not isinstance(rotary, nn.Module) or not isinstance(norm, FusedRmsNorm):
        return None
    ids, positions = torch.arange(_PROBE_TOKENS)[None], torch.arange(3, 3 + _PROBE_TOKENS)[None]
    step = StepContext()
    step.fill(None, _Unplanned())
    hidden = embed(ids)
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
    with replaced([*computed, (rotary, compute_angles)]):
        try:
            output = decoder(input_ids=ids, position_ids=positions, use_cache=False, step=step)
        except PROBE_ERRORS:
            return None
    if len(inputs) != len(layers) or not _is_chain(hidden, outputs, [x for x, _ in inputs]):
        return None
    if not is_same(getattr(output, "last_hidden_state", None), norm(outputs[-1])):
        return None
    angles = []
    for _, others in inputs:
        made = [place for place, call in enumerate(seen) if call[2] is others.get("position_embeddings")]
        if not made or unknown_arguments(others) != ["position_embeddings", "step"]:
            return None
        angles.append(made[0])
    calls = list[_RotaryCall]()
    for arguments, options, _ in seen:
        call = _make_call(arguments, options, hidden, positions)
        if call is None:
            return None
        calls.append(call)
    results = [call[2] for call in seen]
    if not all(_are_angles(result, _PROBE_TOKENS) for result in results):
        return None
    again = [call(rotary, torch.zeros_like(hidden[:, :1]), positions) for call in calls]
    if not all(_are_same(*pair) for pair in zip(results, again, strict=True)):
        return None
    keeps_angles = _depend_only_on_positions(rotary, calls, results, positions, hidden.shape[2])
    return _Recipe(embedding, rotary, norm, tuple(calls), tuple(angles), keeps_angles, type(output))


def _read_embedding(embed: Any) -> _Embedding | None:
    """Return the rows that an embedding module looks up, and their factor. None if it does anything else."""
    rows: KernelLinear | Tensor
    read: Callable[[Tensor], Tensor]
    if isinstance(embed, LookupEmbedding) and isinstance(embed.source, KernelLinear):
        rows, num_ids, read = embed.source, embed.source.out_features, embed.source.rows
    elif isinstance(embed, nn.Embedding) and embed.max_norm is None and embed.weight.is_contiguous():
        rows, num_ids, read = embed.weight, len(embed.weight), embed.weight.__getitem__
    else:
        return None
    ids = torch.linspace(0, num_ids - 1, _PROBE_IDS).long()
    try:
        found = embed(ids)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    factors = [float(value) for value in embed.buffers() if value.numel() == 1]
    for factor in (1.0, *factors):
        scale = float(torch.tensor(factor, dtype=torch.bfloat16))
        if found.dtype == torch.bfloat16 and is_same(read(ids) * scale, found):
            return _Embedding(rows, num_ids, found.shape[1], scale)
    return None


def _depend_only_on_positions(
    rotary: nn.Module, calls: Sequence[_RotaryCall], results: Sequence[Any], positions: Tensor, width: int
) -> bool:
    """Return whether each token's angles depend on its position only. Those of some models depend on other rows too."""
    rotary = copy.deepcopy(rotary)  # some modules change their state at far positions
    hidden, others = torch.zeros(1, 1, width, dtype=torch.bfloat16), torch.tensor([[_FAR]])
    try:
        found = [call(rotary, hidden, torch.cat([positions, others], dim=1)) for call in calls]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    near = [[part[:, :-1] for part in angles] for angles in found]
    return all(_are_same(*pair) for pair in zip(results, near, strict=True))


def _are_angles(result: Any, num_tokens: int) -> bool:
    """Return whether these are cos and sin (1, N, A) in bfloat16."""
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(part, Tensor) for part in result):
        return False
    cos, sin = result
    return bool(cos.shape == sin.shape == (1, num_tokens, cos.shape[-1]) and cos.dtype == sin.dtype == torch.bfloat16)


@contextmanager
def replaced(forwards: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
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
    return all(is_same(x, y) for x, y in zip(inputs, expected, strict=True))


def _is_readable(x: Any, num_tokens: int) -> TypeGuard[Tensor]:
    """Return whether the kernel can read x (1, N)."""
    return isinstance(x, Tensor) and x.shape == (1, num_tokens) and x.dtype == torch.long and x.is_contiguous()


def _are_same(angles: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(is_same(*pair) for pair in zip(angles, others, strict=True))


def is_same(x: Any, y: Tensor) -> bool:
    """Return whether x is a tensor of the same type, shape and numbers as y."""
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
        if is_same(value, tensor):
            return place
    return value
