"""Replace small operations of the model by the passes of `fused.cpp`: normalisation, gated MLP, rotated heads.

Their cost is the overhead of torch's operations: a decode step of Gemma-3-270M has 109 small normalisations, and 18
rotations of queries and keys in about twenty operations each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import AttentionPlan
from gpu_worker.model.lora_linear import compute_outputs
from gpu_worker.model.packed_attention import packed_attention
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.kernels.kernel_loading import Kernel, find_function, functions

_Candidate = TypeVar("_Candidate")
_PROBE_ROWS = 8
_LARGE = 1024.0  # a power of two, with which the same roundings stay the same


class Norm(ctypes.Structure):
    """The struct `Norm` of the source. By default there is none."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("rounds_first", c_int32))


class _Heads(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("num_heads", c_int64), ("norm", Norm))


class Angles(ctypes.Structure):
    """The struct `Angles` of the source."""

    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("width", c_int64))


class FusedKernel(Kernel):
    """The compiled passes. Tensors are on the CPU, float32 or bfloat16."""

    library_name = "fused"

    def __init__(self, library: ctypes.CDLL) -> None:
        norm_types = c_void_p, c_void_p, c_int64, c_int64, c_float, c_int32, c_void_p, c_int32
        self._rms_norm = functions(library, "rms_norm", *norm_types)
        self._gated = functions(library, "gated", c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int32)
        rotate_types = *[c_void_p] * 3, c_int64, c_int64, c_int32
        by_dtype = functions(library, "rotate", *rotate_types)
        self._rotate = {(dtype, dtype): function for dtype, function in by_dtype.items()}
        self._rotate[torch.bfloat16, torch.float32] = find_function(library, "rotate_bf16_by_f32", *rotate_types)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, rounds_first: bool) -> Tensor:
        """Return x / sqrt(mean(x²) + eps) · weight over the last dim. x (..., W), weight (W,) float32.

        `rounds_first`: round the quotient to x's dtype before the product, as Llama does.
        """
        x = x if _is_dense(x) else x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        sizes = x.numel() // width, width, eps, rounds_first
        self._rms_norm[x.dtype](x.data_ptr(), weight.data_ptr(), *sizes, y.data_ptr(), torch.get_num_threads())
        return y

    def gated(self, gate: Tensor, up: Tensor, *, is_silu: bool) -> Tensor:
        """Return silu(gate) · up, or gelu(gate) · up in the tanh form. Equal shapes and dtypes, contiguous."""
        y = torch.empty_like(gate)
        pointers = gate.data_ptr(), up.data_ptr()
        self._gated[gate.dtype](*pointers, gate.numel(), is_silu, y.data_ptr(), torch.get_num_threads())
        return y

    def rotate(
        self,
        query: Tensor,
        key: Tensor,
        norms: Sequence[FusedRmsNorm | None],
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """Normalise each head of query and key, where it has a norm, and rotate its first W values, in place.

        x <- x cos + rotate_half(x) sin. query (1, N, Q, D), key (1, N, H, D), cos and sin (1, N, W). Products are
        rounded to the dtype of the angles, which is that of the heads or float32 (OLMo).
        """
        num_tokens, head_dim = query.shape[1], query.shape[3]
        assert query.is_contiguous() and key.is_contiguous() and key.shape[3] == head_dim, "heads must be contiguous"
        assert cos.shape == sin.shape == (1, num_tokens, cos.shape[2]), f"angles have shape {tuple(cos.shape)}"
        rotate = self._rotate.get((query.dtype, cos.dtype))
        assert rotate is not None and cos.shape[2] <= head_dim, "angles do not fit"
        assert cos.dtype == sin.dtype and query.dtype == key.dtype, "angles or heads have two dtypes"
        cos, sin = cos.contiguous(), sin.contiguous()
        heads = [_heads(part, norm) for part, norm in zip((query, key), norms, strict=True)]
        parts = *heads, Angles(cos.data_ptr(), sin.data_ptr(), cos.shape[2])
        pointers = [ctypes.addressof(part) for part in parts]
        rotate(*pointers, num_tokens, head_dim, torch.get_num_threads())


class FusedRmsNorm(nn.Module):
    """An RMSNorm. `weight` (W,) float32 is the final factor: for Gemma 1 + its parameter."""

    def __init__(self, kernel: FusedKernel, weight: Tensor, eps: float, rounds_first: bool) -> None:
        super().__init__()
        self._kernel, self.weight, self.eps, self.rounds_first = kernel, weight, eps, rounds_first

    @property
    def struct(self) -> Norm:
        return Norm(self.weight.data_ptr(), self.eps, self.rounds_first)

    def forward(self, x: Tensor) -> Tensor:  # (..., W) -> (..., W)
        return self._kernel.rms_norm(x, self.weight, self.eps, rounds_first=self.rounds_first)


class FusedMlp(nn.Module):
    """down(act(gate(x)) · up(x)) over the model's own linear layers."""

    def __init__(self, kernel: FusedKernel, mlp: Any, is_silu: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self._kernel, self.is_silu = kernel, is_silu

    def forward(self, x: Tensor) -> Tensor:  # (..., N, H) -> (..., N, H)
        gate, up = compute_outputs((self.gate_proj, self.up_proj), x)
        y: Tensor = self.down_proj(self._kernel.gated(gate, up, is_silu=self.is_silu))
        return y


class FusedAttention(nn.Module):
    """Self-attention over the model's own linear layers. `norms`: of the heads of query and key, if it has them."""

    def __init__(
        self, kernel: FusedKernel, own: Any, norms: Sequence[FusedRmsNorm | None], sliding_window: int | None
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = own.q_proj, own.k_proj, own.v_proj, own.o_proj
        self.q_norm, self.k_norm = norms
        self.config, self.layer_idx, self.is_causal = own.config, own.layer_idx, getattr(own, "is_causal", True)
        self.num_key_value_groups = getattr(own, "num_key_value_groups", 1)  # read by transformers' own functions
        self.head_dim, self.scaling = own.head_dim, own.scaling
        self.sliding_window = sliding_window
        self._kernel = kernel

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:  # (1, N, H) -> (1, N, H)
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        projected = compute_outputs((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        query, key, value = (part.view(shape) for part in projected)
        self._kernel.rotate(query, key, (self.q_norm, self.k_norm), *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, packed_attention)
        heads = (part.transpose(1, 2) for part in (query, key, value))
        limits = {"scaling": self.scaling, "sliding_window": self.sliding_window}
        attended, weights = attend(self, *heads, attention_mask, **limits, **others)
        return self.o_proj(attended.reshape(*hidden_states.shape[:2], -1)), weights


class Choices:
    """What the comparisons of `fuse` and `compile_layers` chose, in their order: the place of a candidate, or None.

    With `known`, those of an earlier start for the same model, nothing is compared.
    """

    def __init__(self, known: Sequence[int | None] | None = None) -> None:
        self.made: list[int | None] = []
        self.are_known = known is not None
        self._known = iter(known or ())

    def first(self, candidates: Sequence[_Candidate], is_same: Callable[[_Candidate], bool]) -> _Candidate | None:
        """Return the first of the candidates that is the same as the model's own module."""
        if self.are_known:
            place = next(self._known, None)
        else:
            place = next((place for place, each in enumerate(candidates) if is_same(each)), None)
        self.made.append(place)
        return None if place is None else candidates[place]


@torch.inference_mode()
def fuse(model: nn.Module, kernel: FusedKernel, choices: Choices) -> None:
    """Replace, in place, every normalisation, MLP and attention of `model` that has the same result with the kernel.

    Both are run on random input and compared, so other variants of a model family stay as they are. So does a module
    with hooks, which its replacement would not run.
    """
    for name, module in list(model.named_modules()):
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        fused: nn.Module | None = (
            _fused_norm(module, kernel, choices)
            or _fused_mlp(module, kernel, choices)
            or _fused_attention(module, kernel, choices)
        )
        if fused is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fused)


def _fused_norm(module: Any, kernel: FusedKernel, choices: Choices) -> FusedRmsNorm | None:
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor):
        return None
    plain, shifted = weight.float(), 1 + weight.float()
    candidates = [FusedRmsNorm(kernel, w, eps, first) for w in (shifted, plain) for first in (False, True)]

    def is_same(fused: FusedRmsNorm) -> bool:
        x = probe_input(weight.shape[0], weight.dtype)
        return _agree(fused(x), module(x))

    return choices.first(candidates, is_same)


def _fused_mlp(module: Any, kernel: FusedKernel, choices: Choices) -> FusedMlp | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(module, "act_fn", None)
    if not all(isinstance(part, nn.Linear) for part in parts) or activation is None:
        return None

    def is_same(fused: FusedMlp) -> bool:
        weight = module.gate_proj.weight
        gate, up = probe_input(weight.shape[0], weight.dtype, count=2)
        x = probe_input(weight.shape[1], weight.dtype)
        same_values = _agree(kernel.gated(gate, up, is_silu=fused.is_silu), activation(gate) * up)
        # a different rounding changes all sums slightly
        return same_values and _agree(fused(x), module(x), most_unequal=1.0)

    return choices.first([FusedMlp(kernel, module, is_silu) for is_silu in (False, True)], is_same)


def _fused_attention(module: Any, kernel: FusedKernel, choices: Choices) -> FusedAttention | None:
    parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    head_dim, scaling = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    if not all(isinstance(part, nn.Linear) for part in parts) or not isinstance(scaling, float):
        return None
    if not isinstance(head_dim, int) or head_dim % 4 or not isinstance(getattr(module, "layer_idx", None), int):
        return None
    norms = []
    for own in (getattr(module, "q_norm", None), getattr(module, "k_norm", None)):
        norm = None if own is None else _fused_norm(own, kernel, choices)
        if own is not None and (norm is None or norm.weight.shape != (head_dim,)):
            return None
        norms.append(norm)
    windows = dict.fromkeys(getattr(of, "sliding_window", None) for of in (module, module.config))
    candidates = [FusedAttention(kernel, module, norms, window) for window in windows]
    return choices.first(candidates, lambda fused: _attend_alike(fused, module))


def _attend_alike(fused: FusedAttention, own: Any) -> bool:
    """Return whether both call the attention function alike, for angles of whole heads and of their first half.

    A model that rotates whole heads cannot be called with fewer angles, and never is. Nor can most models of bfloat16
    be called with float32 angles.
    """
    weight = own.q_proj.weight
    hidden = probe_input(weight.shape[1], weight.dtype)[None]
    dtypes = dict.fromkeys((weight.dtype, torch.float32))
    for width, dtype in product((own.head_dim, own.head_dim // 2), dtypes):
        try:
            expected = _attended(own, hidden, width, dtype)
        except (AttributeError, BaseModelUnsupported, RuntimeError, TypeError, ValueError):
            if width == own.head_dim and dtype == weight.dtype:
                return False
            continue
        found = _attended(fused, hidden, width, dtype)
        if expected is None or found is None or found[1:3] != expected[1:3]:
            return False
        if not all(_agree(*pair) for pair in zip(found[3:], expected[3:], strict=True)):
            return False
        if not _agree(found[0], expected[0], most_unequal=1.0):
            return False
    return True


class CallRecorder(AttentionPlan):
    """Records the arguments of one call, and returns the query."""

    def __init__(self) -> None:
        self.seen: tuple[float, int | None, Tensor, Tensor, Tensor] | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        self.seen = scaling, sliding_window, query, key, value
        return query.transpose(0, 1)


def _attended(module: nn.Module, hidden: Tensor, width: int, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """Return the output for random angles (1, N, width), and the arguments of the attention function if called."""
    angles = torch.rand(hidden.shape[1], width // 2, generator=torch.Generator().manual_seed(1)) * 6
    both = torch.cat([angles, angles], dim=-1)[None]
    recorder, step = CallRecorder(), StepContext()
    step.fill(None, recorder)
    rotation = both.cos().to(dtype), both.sin().to(dtype)
    output, _ = module(hidden_states=hidden, position_embeddings=rotation, attention_mask=None, step=step)
    return None if recorder.seen is None else (output, *recorder.seen)


def probe_input(width: int, dtype: torch.dtype, *, count: int = 0) -> Tensor:
    """Return random input (N, W), or `count` of them. Half of the rows have the magnitudes of activations.

    The others are so large that a module which clips its values shows it.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (count, _PROBE_ROWS, width) if count else (_PROBE_ROWS, width)
    x = 4 * torch.randn(shape, generator=generator)
    x[..., _PROBE_ROWS // 2 :, :] *= _LARGE
    return x.to(dtype)


def _heads(x: Tensor, norm: FusedRmsNorm | None) -> _Heads:
    return _Heads(x.data_ptr(), x.shape[2], Norm() if norm is None else norm.struct)


def _agree(fused: Tensor, own: Tensor, *, most_unequal: float = 0.01) -> bool:
    """Return whether both are equal up to rounding, which may change a small share of the values by about one unit."""
    fused, own = fused.float(), own.float()
    unequal = ~torch.isclose(fused, own, rtol=1e-5, atol=1e-6)
    allowed = 0.01 * (own.abs() + own.abs().mean(-1, keepdim=True))
    is_close = bool(((fused - own).abs() <= allowed).all())
    return is_close and float(unequal.float().mean()) <= most_unequal


def _is_dense(x: Tensor) -> bool:
    """Return whether x is contiguous in memory as (..., W), or as (tokens, heads) transposed to heads first."""
    return x.is_contiguous() or (x.dim() == 4 and x.transpose(1, 2).is_contiguous())
