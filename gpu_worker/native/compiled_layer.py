"""Compute a decoder layer in one call of `decoder_layer.cpp`, or in two around the attention of a prompt's chunk.

The call runs the kernels of the layer's parts in the same order, so the result is the same, bit for bit. It avoids the
overhead of torch's operations and of the Python calls between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.grouped_mapping import GroupedMapping
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.packed_attention import unknown_arguments
from gpu_worker.model.packed_linear import KernelLinear
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.attention_cpu import HostAttention
from gpu_worker.native.attention.decode_attention import Cache, make_cache_struct
from gpu_worker.native.fused import (
    Angles,
    CallRecorder,
    Choices,
    FusedAttention,
    FusedMlp,
    FusedRmsNorm,
    Norm,
    probe_input,
)
from gpu_worker.native.kernels.kernel_loading import find_function, load_library

_FUNCTIONS = (  # in the order of the struct Kernels: library, function
    ("packed_linear", "linears_bf16"),
    ("grouped_lora", "add_bf16"),
    ("fused", "rms_norm_bf16"),
    ("fused", "gated_bf16"),
    ("fused", "rotate_bf16"),
    ("decode_attention", "write_kv_bf16"),
    ("decode_attention", "attend_bf16"),
    ("packed_linear", "rows_bf16"),
)
# The norms before the attention, after it, before the MLP and after it. A norm after a part is applied to its output,
# before the sum with the input. Most families have none.
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", None, "post_attention_layernorm", None),
)


class _Projection(ctypes.Structure):
    _fields_ = (("linear", c_void_p), ("place", c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        *((name, Norm) for name in ("of_query", "of_key")),
        *((name, _Projection) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, c_void_p) for name in ("attention_input", "output_input", "mlp_input", "down_input")),
        ("head_dim", c_int64),
        ("is_silu", c_int32),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("pairs", c_void_p),
        ("h", c_void_p),
        ("angles", Angles),
        ("slots", c_void_p),
        ("decodes", c_void_p),
        ("scratch", c_void_p),
        ("num_threads", c_int32),
    )


class LayerKernel:
    """The compiled layer, and the libraries whose functions it calls."""

    def __init__(self, library: ctypes.CDLL, functions: Sequence[Any]) -> None:
        self._functions = (c_void_p * len(functions))(*(ctypes.cast(each, c_void_p) for each in functions))
        self._layer = find_function(library, "decoder_layer_bf16", *[c_void_p] * 6)
        self._before = find_function(library, "before_attention_bf16", *[c_void_p] * 4)
        self._after = find_function(library, "after_attention_bf16", *[c_void_p] * 6)
        tokens = c_void_p, c_void_p, c_int64
        self._decoder = library.decoder_bf16
        self._decoder.argtypes = c_void_p, c_void_p, *tokens, c_void_p, c_void_p, c_int64, c_void_p, c_int32
        self._decoder.restype = c_int32
        self.scratch_values = library.scratch_values
        self.scratch_values.argtypes, self.scratch_values.restype = (c_void_p,), c_int64

    def __call__(self, layer: int, step: int, cache: int, x: Tensor, y: Tensor) -> None:
        """Set y (1, N, H) to the layer's output for x (1, N, H). `layer`, `step` and `cache` are addresses."""
        self._layer(self._functions, layer, step, cache, x.data_ptr(), y.data_ptr())

    def decoder(
        self, decoder: int, ids: Tensor, positions: Tensor | None, angles: Tensor, calls: NDArray[np.int64], y: Tensor
    ) -> int:
        """Set y (1, N, H) to the decoder's output, and `angles` to those of the positions. Return a code of the source.

        `positions`: None if the angles are set. calls (L, 3): the addresses of layer, step and cache of each layer.
        """
        tokens = ids.data_ptr(), None if positions is None else positions.data_ptr(), y.shape[1]
        places = *tokens, angles.data_ptr(), calls.ctypes.data, len(calls)
        code: int = self._decoder(self._functions, decoder, *places, y.data_ptr(), torch.get_num_threads())
        return code

    def before_attention(self, layer: int, step: int, x: Tensor) -> None:
        """Compute the queries, keys and values in the scratch memory, the first two rotated."""
        self._before(self._functions, layer, step, x.data_ptr())

    def after_attention(self, layer: int, step: int, x: Tensor, attended: Tensor, y: Tensor) -> None:
        """Set y (1, N, H) to the layer's output for x (1, N, H) and its attention (N, Q, D)."""
        self._after(self._functions, layer, step, x.data_ptr(), attended.data_ptr(), y.data_ptr())


@dataclass(frozen=True, slots=True)
class _Parts:
    """The modules of a layer. A norm is None where the layer has none."""

    attention: FusedAttention
    mlp: FusedMlp
    norms: tuple[FusedRmsNorm | None, ...]  # in the order of `_NORMS`

    @classmethod
    def of(cls, module: nn.Module) -> _Parts | None:
        """Return the parts if the kernel can compute them. `_agree` checks their order."""
        attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
        if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedMlp) or not attention.is_causal:
            return None
        for names in _NORMS:
            norms = [None if name is None else getattr(module, name, None) for name in names]
            if all(name is None or isinstance(norm, FusedRmsNorm) for name, norm in zip(names, norms, strict=True)):
                parts = cls(attention, mlp, tuple(norms))
                return parts if parts._has_packed_layers() else None
        return None

    @property
    def linears(self) -> tuple[tuple[LoraLinear, ...], ...]:
        """Return the linear layers, those together that read one input."""
        attention, mlp = self.attention, self.mlp
        found = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        return cast("tuple[tuple[LoraLinear, ...], ...]", found)

    def in_order(self, x: Tensor, **others: Any) -> Tensor:
        """Compute the layer as the kernel does, part by part."""
        before_attention, after_attention, before_mlp, after_mlp = (norm or nn.Identity() for norm in self.norms)
        x = x + after_attention(self.attention(hidden_states=before_attention(x), **others)[0])
        y: Tensor = x + after_mlp(self.mlp(before_mlp(x)))
        return y

    def struct(self) -> _Layer:
        norms = *self.norms, self.attention.q_norm, self.attention.k_norm
        linears = [linear for group in self.linears for linear in group]
        projections = [_Projection(cast("KernelLinear", each.base).address, each.bank.address) for each in linears]
        inputs = [group[0].bank.inputs.address for group in self.linears]
        structs = [Norm() if norm is None else norm.struct for norm in norms]
        return _Layer(*structs, *projections, *inputs, self.attention.head_dim, self.mlp.is_silu)

    def _has_packed_layers(self) -> bool:
        for group in self.linears:
            if not all(isinstance(each, LoraLinear) and isinstance(each.base, KernelLinear) for each in group):
                return False
            if any(cast("KernelLinear", each.base).dtype != torch.bfloat16 for each in group):
                return False
            if any(each.bank.inputs is not group[0].bank.inputs for each in group):
                return False
        (query, key, value), (output,), (gate, up), (down,) = (
            [cast("KernelLinear", each.base) for each in group] for group in self.linears
        )
        width, head_dim = query.in_features, self.attention.head_dim
        return (
            width == gate.in_features == output.out_features == down.out_features
            and all(norm is None or norm.weight.shape == (width,) for norm in self.norms)
            and key.out_features == value.out_features
            and gate.out_features == up.out_features == down.in_features
            and query.out_features == output.in_features
            and not key.out_features % head_dim
            and not query.out_features % key.out_features
        )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A part of the layers' shapes. One struct describes the step for all layers that have it in common."""

    num_query_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None


class Steps:
    """The structs of the current step, which its layers share.

    A layer's weights evict Python's own data from the processor's caches, so a step makes each struct once.
    """

    def __init__(self) -> None:
        self.num_modules, self.scratch_values = 0, 0  # the most of any layer
        self._last: tuple[object, object] = None, None  # the step's attention plan and composition
        self._made: dict[tuple[int, int, LayerShape], tuple[int, tuple[object, ...]]] = {}  # address; what it refers to
        self.scratch = torch.empty(0, dtype=torch.bfloat16)  # the memory plan's copies of hidden states include it

    def address(
        self, context: StepContext, attention: HostAttention, angles: Any, layer: int, shape: LayerShape
    ) -> int | None:
        """Return the address of the struct, or None if the kernel cannot compute this step."""
        if self._last[0] is not attention or self._last[1] is not context.composition:
            self._last = attention, context.composition
            self._made.clear()
        group = attention.groups[layer]
        key = id(angles), id(group), shape
        found = self._made.get(key)
        if found is None:
            found = self._make(context, attention, angles, layer, shape)
            if found is None:
                return None
            self._made[key] = found
        return found[0]

    def _make(
        self, context: StepContext, attention: HostAttention, angles: Any, layer: int, shape: LayerShape
    ) -> tuple[int, tuple[object, ...]] | None:
        composition, slots = context.composition, attention.groups[layer].slots
        if composition is not None and not isinstance(composition, GroupedMapping):
            return None
        if not _are_angles(angles, len(slots), shape.head_dim):
            return None
        decodes = None
        if attention.is_compiled:
            decodes = attention.decode_arguments(
                layer, shape.num_query_heads, scaling=shape.scaling, sliding_window=shape.sliding_window
            )
        if self.scratch.numel() < (num_values := len(slots) * self.scratch_values):
            self.scratch = torch.empty(num_values, dtype=torch.bfloat16)
        cos, sin = angles
        pairs, h = (None, None) if composition is None else composition.arguments(self.num_modules)
        step = _Step(
            len(slots),
            pairs,
            None if h is None else h.data_ptr(),
            Angles(cos.data_ptr(), sin.data_ptr(), cos.shape[2]),
            slots.data_ptr(),
            None if decodes is None else ctypes.addressof(decodes),
            self.scratch.data_ptr(),
            torch.get_num_threads(),
        )
        return ctypes.addressof(step), (step, angles, h, self.scratch)


class CompiledLayer:
    """The `forward` of a decoder layer: the kernel where it can compute the step, else the layer's own `forward`."""

    def __init__(self, own: nn.Module, parts: _Parts, kernel: LayerKernel, steps: Steps) -> None:
        self._own: Callable[..., Any] = own.forward
        self._kernel, self.steps, self._layer = kernel, steps, parts.struct()
        self.address = ctypes.addressof(self._layer)
        steps.scratch_values = max(steps.scratch_values, kernel.scratch_values(self.address))
        most_modules = max(group[0].bank.inputs.num_modules for group in parts.linears)
        steps.num_modules = max(steps.num_modules, most_modules)
        attention = parts.attention
        query, key = attention.q_proj.base, attention.k_proj.base
        head_dim, self.width, self.index = attention.head_dim, query.in_features, attention.layer_idx
        self.shape = LayerShape(query.out_features // head_dim, head_dim, attention.scaling, attention.sliding_window)
        self._cache_shape = key.out_features // head_dim, head_dim
        inner = [module for module in own.modules() if module is not own]
        self.hooks = [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._cache: tuple[Tensor, Cache, int] | None = None  # for the layer's keys, which all steps share

    def __call__(self, hidden_states: Tensor, *arguments: Any, **others: Any) -> Any:  # (1, N, H) -> (1, N, H)
        context = others.get("step")
        if isinstance(context, StepContext) and not arguments and self._fits(hidden_states, others):
            y = self._compiled(hidden_states, context, others["position_embeddings"])
            if y is not None:
                return y
        return self._own(hidden_states, *arguments, **others)

    def _compiled(self, x: Tensor, context: StepContext, angles: Any) -> Tensor | None:
        """Return the layer's output, or None if the kernel cannot compute this step."""
        attention = context.attention
        if not isinstance(attention, HostAttention) or x.shape[1] != len(attention.token_positions):
            return None
        step = self.steps.address(context, attention, angles, self.index, self.shape)
        cache = self.cache_address(attention.keys[self.index], attention.values[self.index])
        if step is None or cache is None:
            return None
        context.plan_attention(self.index)
        y = torch.empty_like(x)
        if attention.is_compiled:
            self._kernel(self.address, step, cache, x, y)
            return y
        self._kernel.before_attention(self.address, step, x)
        attended = attention.attend(
            self.index,
            *self._heads(x.shape[1]),
            scaling=self.shape.scaling,
            sliding_window=self.shape.sliding_window,
        )
        self._kernel.after_attention(self.address, step, x, attended, y)
        return y

    def _heads(self, num_tokens: int) -> list[Tensor]:
        """Return query (Q, N, D), key and value (H, N, D) in the scratch memory, behind two hidden states."""
        num_key_heads, head_dim = self._cache_shape
        counts = [num_tokens * heads * head_dim for heads in (self.shape.num_query_heads, num_key_heads, num_key_heads)]
        start = 2 * num_tokens * self.width
        parts = torch.split(self.steps.scratch[start : start + sum(counts)], counts)
        return [part.view(num_tokens, -1, head_dim).transpose(0, 1) for part in parts]

    def _fits(self, x: Tensor, others: dict[str, Any]) -> bool:
        """Return whether the kernel can read this input, and no option or hook asks for more than it computes."""
        return (
            x.dtype == torch.bfloat16
            and x.is_contiguous()
            and x.shape[::2] == (1, self.width)
            and unknown_arguments(others) == ["position_embeddings", "step"]
            and others.get("is_causal") is not False
            and not any(self.hooks)
        )

    def cache_address(self, keys: Tensor, values: Tensor) -> int | None:
        """Return the address of the struct of the layer's keys and values, None if their heads are not the layer's."""
        if self._cache is None or self._cache[0] is not keys:
            if keys.dtype != torch.bfloat16 or keys.shape[::2] != self._cache_shape:
                return None
            cache = make_cache_struct(keys, values)
            self._cache = keys, cache, ctypes.addressof(cache)
        return self._cache[2]


def load_layer_kernel(cache_dir: Path) -> LayerKernel | None:
    """Load the kernel, compiling it into `cache_dir` if needed. Return None, after a warning, if that fails."""
    names = "decoder_layer", *dict.fromkeys(name for name, _ in _FUNCTIONS)
    libraries = {name: load_library(name, cache_dir) for name in names}
    found = {name: library for name, library in libraries.items() if library is not None}
    if len(found) < len(libraries):
        return None
    return LayerKernel(found["decoder_layer"], [getattr(found[name], function) for name, function in _FUNCTIONS])


@torch.inference_mode()
def compile_layers(model: nn.Module, kernel: LayerKernel, choices: Choices) -> int:
    """Let the kernel compute, in place, every decoder layer that has the same result with it. Return their number.

    Layers are compared on random input, so other orders of the same parts stay as they are. A layer with hooks inside
    computes itself, also if they are added later. Parts that are replaced later are not noticed.
    """
    found = ((own, choices.first([parts], partial(_agree, own))) for own, parts in _candidates(model))
    alike = [(own, parts) for own, parts in found if parts is not None]
    steps = Steps()
    for own, parts in alike:
        own.forward = CompiledLayer(own, parts, kernel, steps)
    return len(alike)


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, _Parts]]:
    for module in model.modules():
        parts = _Parts.of(module)
        if parts is not None:
            yield module, parts


def _agree(own: nn.Module, parts: _Parts) -> bool:
    """Return whether the layer computes its parts in the kernel's order."""
    hidden = probe_input(parts.attention.q_proj.base.in_features, torch.bfloat16)[None]
    angles = torch.rand(1, hidden.shape[1], parts.attention.head_dim, generator=torch.Generator().manual_seed(1))
    rotation = angles.cos().bfloat16(), angles.sin().bfloat16()
    outputs = []
    for forward in (own, parts.in_order):
        recorder, step = CallRecorder(), StepContext()
        step.fill(None, recorder)
        try:
            outputs.append(forward(hidden, position_embeddings=rotation, attention_mask=None, step=step))
        except (AssertionError, AttributeError, BaseModelUnsupported, LookupError, RuntimeError, TypeError, ValueError):
            return False
    found, expected = outputs
    return isinstance(found, Tensor) and isinstance(expected, Tensor) and torch.equal(found, expected)


def _are_angles(angles: Any, num_tokens: int, head_dim: int) -> TypeGuard[tuple[Tensor, Tensor]]:
    if not isinstance(angles, tuple) or len(angles) != 2 or not all(isinstance(part, Tensor) for part in angles):
        return False
    cos, sin = angles
    are_alike: bool = cos.shape == sin.shape == (1, num_tokens, cos.shape[-1])
    are_alike = are_alike and cos.dtype == sin.dtype == torch.bfloat16
    return are_alike and cos.is_contiguous() and sin.is_contiguous() and cos.shape[2] <= head_dim
