"""The fused passes compared with the model families' own modules, value by value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb

from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.packed_attention import ATTENTION_NAME, packed_attention
from gpu_worker.native.fused import Choices, FusedKernel, FusedRmsNorm, fuse
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import MakeEngine, ask, by_digest, compiled, greedy, only
from tests.tiny import TinyBase

DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def kernel() -> FusedKernel:
    return compiled(FusedKernel.load)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_same(found: Tensor, expected: Tensor, atol: float = 3e-6) -> None:
    """Check equality up to float32's order of summation, which sometimes changes a rounding to bfloat16.

    `atol`: torch's tanh form of gelu ends in -0, while the fused one continues with smaller numbers.
    """
    assert found.dtype == expected.dtype
    is_half = found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=8e-3 if is_half else 1e-5, atol=atol)
    moved = ~torch.isclose(found, expected, rtol=1e-5, atol=atol)
    assert moved.float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [640, 256, 33, 7])
@pytest.mark.parametrize("family", [Gemma3RMSNorm, LlamaRMSNorm])
def test_norms_equal_those_of_their_family(
    family: type[nn.Module], width: int, dtype: torch.dtype, kernel: FusedKernel
) -> None:
    model = nn.Module()
    model.norm = family(width, eps=1e-6).to(dtype)
    model.norm.weight.data = draw(width, dtype=dtype, seed=1)
    own = model.norm
    fuse(model, kernel, Choices())
    assert type(model.norm).__name__ == "FusedRmsNorm"
    for x in (
        draw(1, 70, width, dtype=dtype),
        draw(1, 3, 4, width, dtype=dtype).transpose(1, 2),
        torch.zeros(2, width, dtype=dtype),
    ):
        assert_same(model.norm(x), own(x))
    gaps = draw(5, 2 * width, dtype=dtype)[:, :width]
    assert_same(model.norm(gaps), own(gaps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 2048), (3, 5)])
@pytest.mark.parametrize(
    ("is_silu", "activation"),
    [(True, nn.functional.silu), (False, lambda x: gelu(x, approximate="tanh"))],
    ids=["silu", "gelu"],
)
def test_gated_activations_equal_torchs(
    is_silu: bool,
    activation: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel: FusedKernel,
) -> None:
    gate, up = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    assert_same(kernel.gated(gate, up, is_silu=is_silu), activation(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_silu", [True, False])
def test_non_finite_values_stay_non_finite(is_silu: bool, dtype: torch.dtype, kernel: FusedKernel) -> None:
    gate = torch.tensor([-INF, -1e30, -100.0, -30.0, 0.0, 30.0, 1e30, INF, NAN], dtype=dtype)
    activation = nn.functional.silu if is_silu else lambda x: gelu(x, approximate="tanh")
    found, expected = kernel.gated(gate, torch.ones_like(gate), is_silu=is_silu), activation(gate)
    torch.testing.assert_close(found[1:], expected[1:], equal_nan=True)
    assert found.isfinite().tolist() == [False, *[True] * 6, False, False]
    assert not kernel.rms_norm(gate, torch.ones(9), 1e-6, rounds_first=False).isfinite().any()
    x = draw(3, 640, dtype=dtype)
    x[1] = NAN
    found = kernel.rms_norm(x, torch.ones(640), 1e-6, rounds_first=True)
    assert found.isfinite().all(dim=1).tolist() == [True, False, True], "other rows are unaffected"


@pytest.mark.parametrize(
    ("dtype", "angle_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(("num_tokens", "heads", "head_dim", "width"), [(70, (4, 1), 256, 256), (5, (3, 3), 24, 12)])
@pytest.mark.parametrize("has_norms", [True, False])
def test_rotated_heads_equal_those_of_torch(
    has_norms: bool,
    num_tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    width: int,
    dtype: torch.dtype,
    angle_dtype: torch.dtype,
    kernel: FusedKernel,
) -> None:
    query, key = (
        draw(1, num_tokens, num_heads, head_dim, dtype=dtype, seed=num_heads + seed)
        for seed, num_heads in enumerate(heads)
    )
    angles = draw(1, num_tokens, width // 2, dtype=torch.float32, seed=9).repeat(1, 1, 2)
    cos, sin = angles.cos().to(angle_dtype), angles.sin().to(angle_dtype)
    norms = [FusedRmsNorm(kernel, draw(head_dim, dtype=torch.float32, seed=seed), 1e-6, True) for seed in (5, 6)]
    normed = [norm(part) if has_norms else part for norm, part in zip(norms, (query, key), strict=True)]
    turned = apply_rotary_pos_emb(*(part[..., :width] for part in normed), cos, sin, unsqueeze_dim=2)
    pairs = zip(turned, normed, strict=True)
    expected = [torch.cat([each.to(dtype), part[..., width:]], dim=-1) for each, part in pairs]
    kernel.rotate(query, key, norms if has_norms else (None, None), cos, sin)
    assert_same(query, expected[0], atol=1e-5)
    assert_same(key, expected[1], atol=1e-5)


def test_angles_that_do_not_fit_are_refused(kernel: FusedKernel) -> None:
    query, key = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 1, 8)
    for angles in (torch.zeros(1, 2, 8), torch.zeros(1, 3, 16), torch.zeros(1, 3, 8, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError, match="angles"):
            kernel.rotate(query, key, (None, None), angles, angles)
    with pytest.raises(AssertionError, match="contiguous"):
        kernel.rotate(query.transpose(1, 2), key, (None, None), torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))


class Scaled(LlamaAttention):
    """Scales its queries."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **others: Any) -> Any:
        return super().forward(hidden_states * 2, *arguments, **others)


class Clipped(LlamaAttention):
    """Clips its output."""

    def forward(self, *arguments: Any, **others: Any) -> Any:
        output, weights = super().forward(*arguments, **others)
        return output.clamp(-0.01, 0.01), weights


class Limited(LlamaAttention):
    """Clips only inputs that are larger than those of most tokens."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **others: Any) -> Any:
        return super().forward(hidden_states.clamp(-100, 100), *arguments, **others)


class Interleaved(LlamaAttention):
    """Rotates pairs of neighbours."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **others: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = [part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)]
        query, key = rotate_interleaved(*parts[:2], *position_embeddings)
        attended, _ = packed_attention(self, query, key, parts[2], None, scaling=self.scaling, step=others["step"])
        return self.o_proj(attended.flatten(-2)), None


class Rounding(LlamaAttention):
    """Rounds its angles, which the fused attention would not do with float32 angles."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **others: Any) -> Any:
        rounded = tuple(part.to(hidden_states.dtype) for part in position_embeddings)
        return super().forward(hidden_states, rounded, **others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [LlamaAttention, Scaled, Clipped, Limited, Interleaved, Rounding])
def test_an_attention_is_replaced_if_it_computes_the_same(
    family: type[LlamaAttention], dtype: torch.dtype, tiny_base: TinyBase, kernel: FusedKernel
) -> None:
    model = nn.Module()
    model.attention = family(tiny_base("llama").model.config, 0).to(dtype)
    fuse(model, kernel, Choices())
    is_same = family is LlamaAttention or (family is Rounding and dtype == torch.float32)
    assert type(model.attention).__name__ == ("FusedAttention" if is_same else family.__name__)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_every_norm_mlp_and_attention_of_a_model_is_fused(
    family: str, tiny_base: TinyBase, kernel: FusedKernel
) -> None:
    model = tiny_base(family).model
    before = Counter(type(module).__name__ for module in model.modules())
    ids = torch.arange(40)[None] % model.config.vocab_size
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        expected = model(ids).logits
        model.set_attn_implementation(ATTENTION_NAME)
        fuse(model, kernel, Choices())
        model.set_attn_implementation("sdpa")
        assert_same(model(ids).logits, expected, atol=1e-4)
    after = Counter(type(module).__name__ for module in model.modules())
    assert after["FusedMlp"] == after["FusedAttention"] == model.config.num_hidden_layers
    assert after["FusedRmsNorm"] == sum(count for name, count in before.items() if name.endswith("RMSNorm")) > 0


def test_modules_with_other_formulas_are_not_replaced(kernel: FusedKernel) -> None:
    class CentredRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(-1, keepdim=True))

    class Mlp(nn.Module):
        def __init__(self, act_fn: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)
            self.act_fn = act_fn

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Capped(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-0.1, 0.1)

    class Limited(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(-100, 100))

    others = [CentredRMSNorm(64), Mlp(nn.GELU()), Mlp(nn.ReLU()), Capped(nn.SiLU()), Limited(nn.SiLU())]
    model = nn.ModuleList([*others, Mlp(nn.SiLU())])
    fuse(model, kernel, Choices())
    found = [type(module).__name__ for module in model]
    assert found == ["CentredRMSNorm", "Mlp", "Mlp", "Capped", "Limited", "FusedMlp"]


def test_layers_that_read_one_input_add_their_adapters_at_once(
    make_engine: MakeEngine, pool: list[AdapterWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query, key and value; gate and up."""
    assert compiled(FusedKernel.load) is not None
    engine, asked, each = make_engine(by_digest(*pool)), list[int](), LoraLinear.each

    def counted(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
        asked.append(len(layers))
        return each(layers, x)

    monkeypatch.setattr(LoraLinear, "each", staticmethod(counted))
    ask(engine, greedy("abc", only(pool[0]), num_new=1))
    engine.step()
    assert asked == [3, 1, 2, 1] * engine.base.num_layers
