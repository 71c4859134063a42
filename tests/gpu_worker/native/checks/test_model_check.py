"""The comparison with transformers' own model at start: its refusals, and that it leaves no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.attention.attention_cpu import HostAttention
from gpu_worker.native.attention.kv_cache import KvShape
from gpu_worker.native.attention.kv_pages import HostKvCache
from tests.gpu_worker.engine_driver import MakeEngine, assert_nothing_held
from tests.gpu_worker.families import EQUAL, save
from tests.tiny import TinyBase, tiny_config


class Shortsighted(HostKvCache):
    """Attention whose decode tokens do not see the previous token."""

    def _attention(self, segments: Sequence[Segment]) -> HostAttention:
        for segment in segments:
            if segment.num_tokens == 1 and segment.context_len > 0:
                last = torch.tensor(segment.context_len - 1)
                for values, group in zip(self.values, self._group_of, strict=True):
                    values[:, self._pages[group].slots(torch.tensor(segment.row), last)] = 0
        return super()._attention(segments)


class Leaking(HostKvCache):
    """Attention in which all rows of a step see the first row's tokens instead of their own."""

    def _attention(self, segments: Sequence[Segment]) -> HostAttention:
        first = segments[0].row
        return super()._attention([replace(segment, row=first) for segment in segments])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gemma", "float32"), ("gemma", "bfloat16"), ("qwen3_moe", "bfloat16"), ("granitemoe", "bfloat16")],
)
@pytest.mark.parametrize(
    ("cache", "where"), [(Shortsighted, "decode tokens"), (Leaking, "prompts")], ids=["decode", "rows"]
)
def test_wrong_attention_is_refused(
    cache: Callable[[KvShape], HostKvCache],
    where: str,
    family: str,
    dtype: str,
    make_engine: MakeEngine,
    tmp_path: Path,
) -> None:
    """Also if rounding alone makes experts with random weights tie, so that most tokens differ with an adapter."""
    base = load_base_model(tiny_config(save(tmp_path, family, EQUAL[family]), dtype=dtype))
    with pytest.raises(BaseModelUnsupported, match=f"does not support {family}: .*for {where} with"):
        make_engine({}, base=base, dtype=dtype, build_kv_cache=cache)


def test_a_layer_that_no_adapter_reaches_is_refused(make_engine: MakeEngine, tiny_base: TinyBase) -> None:
    """It multiplies with the layer's weight directly, so the engine's own layer is never called."""
    base = tiny_base("llama")
    mlp = base.model.model.layers[1].mlp
    mlp.forward = lambda x: torch.nn.functional.linear(x @ mlp.up_proj.weight.T, mlp.down_proj.weight)
    with pytest.raises(
        BaseModelUnsupported, match=r"llama: its code uses the weight of a linear layer instead of calling"
    ):
        make_engine({}, "llama", base=base)


def test_a_model_that_depends_on_the_class_of_its_layers_is_refused(
    make_engine: MakeEngine, tiny_base: TinyBase
) -> None:
    """It computes something else once the engine has replaced them."""
    base = tiny_base("llama")
    attention = base.model.model.layers[1].self_attn
    attention.register_forward_hook(
        lambda *call: (call[-1][0] * (1 if type(attention.q_proj) is nn.Linear else 2), None)
    )
    with pytest.raises(BaseModelUnsupported, match=r"does not support llama: .*logits differ"):
        make_engine({}, "llama", base=base)


@pytest.mark.parametrize("window", [9, 30])
def test_a_window_that_is_wrongly_read_is_refused(window: int, make_engine: MakeEngine, tiny_base: TinyBase) -> None:
    """The model's own mask sees 12 tokens, which no prompt of 8 tokens shows."""
    base = tiny_base("gemma3")
    assert base.window == 12
    for layer in base.window_layers:
        base.model.model.layers[layer].self_attn.sliding_window = window
    with pytest.raises(
        BaseModelUnsupported, match=r"gemma3_text: for prompts .*, in rows of 40 tokens, its logits differ"
    ):
        make_engine({}, "gemma3", base=replace(base, window=window))


def test_positions_that_depend_on_the_length_of_a_row_are_refused(make_engine: MakeEngine, tiny_base: TinyBase) -> None:
    """They change for all tokens of a call once it reaches position 20, which chunks and decode tokens do not see."""
    base = tiny_base("llama")

    def stretch(_: nn.Module, inputs: tuple[object, ...], kwargs: dict[str, Tensor], output: object) -> object:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else inputs[1]
        assert isinstance(positions, Tensor) and isinstance(output, tuple)
        cos, sin = output
        return (cos, sin) if int(positions.max()) < 20 else (sin, cos)

    base.model.model.rotary_emb.register_forward_hook(stretch, with_kwargs=True)
    with pytest.raises(BaseModelUnsupported, match=r"does not support llama: .*in rows of 40 tokens"):
        make_engine({}, "llama", base=base)


@pytest.mark.parametrize(("value", "reason"), [(torch.nan, "not finite"), (0.0, "does not change its logits")])
def test_weights_that_show_nothing_are_refused(
    value: float, reason: str, make_engine: MakeEngine, tiny_base: TinyBase
) -> None:
    base = tiny_base("llama")
    with torch.no_grad():
        base.model.get_output_embeddings().weight.fill_(value)
    with pytest.raises(BaseModelUnsupported, match=reason):
        make_engine({}, "llama", base=base)


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_batch_size": 1}, {"max_batch_size": 3, "kv_tokens": 160}, {"bank_rank_rows": 1}, {"max_model_len": 2}],
    ids=str,
)
def test_the_check_fits_any_worker_and_leaves_no_state(
    changes: dict[str, object], make_engine: MakeEngine, tiny_base: TinyBase
) -> None:
    engine = make_engine({}, base=tiny_base(), **changes)
    assert_nothing_held(engine)
    assert engine.residency.resident == frozenset()
    assert engine.residency.occupied_rows == 0
    assert engine.counters.num_steps == 0
    assert engine.base.model.config._attn_implementation == "loraretriever"
