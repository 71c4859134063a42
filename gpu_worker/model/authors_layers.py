"""Classes of transformers with layers of authors' own classes that differ in more than their names."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3DecoderLayer, Gemma3MLP
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from gpu_worker.model.authors_names import AuthorsNames, all_heads, fuse, require


class _Block(dict[str, Any]):
    """Settings of a layer, which vLLM reads as attributes. Those that are null count as absent."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__({name: value for name, value in settings.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return _Block(self[name]) if isinstance(self[name], dict) else self[name]


@strict
class NemotronNASConfig(transformers.LlamaConfig):  # type: ignore[misc]
    """Llama Nemotron Super and Ultra are Llama, some of whose layers lack their attention or their MLP."""

    model_type = "nemotron-nas"
    block_configs: Any = ()
    intermediate_size: int | None = None
    _known: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("no_op", "n_heads_in_group"),
        "ffn": ("no_op", "ffn_mult", "intermediate_size", "hidden_act", "gated"),
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_configs = [_Block(block) for block in self.block_configs]
        if len(self.block_configs) != self.num_hidden_layers:
            raise ValueError(
                f"block_configs must have num_hidden_layers {self.num_hidden_layers} items,"
                f" got {len(self.block_configs)}"
            )
        for number, block in enumerate(self.block_configs):
            self._check(f"block_configs[{number}]", block)
        attentions = [number for number, block in enumerate(self.block_configs) if not block.attention.no_op]
        if attentions[:1] != [0]:
            raise ValueError("block_configs[0].attention.no_op must be False, got True")
        groups = {self.block_configs[number].attention.n_heads_in_group for number in attentions}
        if len(groups) > 1:
            raise ValueError(f"n_heads_in_group must be the same in all layers, got {sorted(groups)}")
        self.num_key_value_heads = self.num_attention_heads // groups.pop()
        self.intermediate_size = max(map(self.width_in, range(self.num_hidden_layers)))
        super().__post_init__(**kwargs)
        needed = {"position_embedding_type": "rope", "bias": False, "logit_scale": 1.0}
        require(self, {**needed, "qkv_bias": self.attention_bias, "hidden_act": "silu"})

    def _check(self, path: str, block: _Block) -> None:
        for part, known in self._known.items():
            if part not in block:
                raise ValueError(f"{path} must have {part}")
            block[part] = {"no_op": False, **block[part]}  # as in the authors' class
            for name, value in block[part].items():
                if name not in known and value:
                    raise ValueError(f"{path}.{part}.{name} must be absent, got {value!r}")
        needed = {"hidden_act": "silu", "gated": True}
        for name, value in needed.items():
            if (found := block.ffn.get(name)) not in (None, value):
                raise ValueError(f"{path}.ffn.{name} must be {value!r}, got {found!r}")

    def width_in(self, layer: int) -> int:
        """Return how many hidden values the layer's MLP has, 0 without one. A factor gives a multiple of 256."""
        mlp = self.block_configs[layer].ffn
        if mlp.no_op:
            return 0
        if "ffn_mult" not in mlp:
            return int(mlp.intermediate_size)
        return -(-int(2 * mlp.ffn_mult * self.hidden_size / 3) // 256) * 256


class _Nothing(nn.Module):
    """Stands for an attention or an MLP that a layer lacks: adds nothing to what the layer has read."""

    def forward(self, x: Any = None, *, hidden_states: Any = None, **_: Any) -> Any:
        return torch.zeros_like(x) if x is not None else (torch.zeros_like(hidden_states), None)


class NemotronNASForCausalLM(AuthorsNames, transformers.LlamaForCausalLM):  # type: ignore[misc]
    names: ClassVar[dict[str, dict[str, str]]] = {}

    def change(self, module: Any) -> None:
        if not isinstance(module, LlamaDecoderLayer):
            return
        number, own = module.self_attn.layer_idx, copy(self.config)
        if self.config.block_configs[number].attention.no_op:
            module.input_layernorm, module.self_attn = nn.Identity(), _Nothing()
        own.intermediate_size = self.config.width_in(number)
        if own.intermediate_size == 0:
            module.post_attention_layernorm, module.mlp = nn.Identity(), _Nothing()
        else:
            module.mlp = LlamaMLP(own)


class _Norm(nn.Module):
    """A norm of each of several groups of values. Its weights are those of the file plus the offset."""

    def __init__(self, size: int, eps: float, *, num_groups: int = 1, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps, self._num_groups, self._offset = eps, num_groups, offset

    def forward(self, x: Tensor) -> Tensor:
        groups = x.float().reshape(*x.shape[:-1], self._num_groups, -1)
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self._eps)
        found: Tensor = groups.flatten(-2) * (self._offset + self.weight.float())
        return found.type_as(x)


class _Through(nn.Module):
    """Layers one after the other that the model holds elsewhere. Without any it changes nothing."""

    def __init__(self, *layers: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            x = layer()(x)
        return x


class MolmoTextConfig(transformers.LlamaConfig):  # type: ignore[misc]
    """Molmo's language model is Llama with fused layers, perhaps with norms behind its layers and of queries and keys.

    Settings have the names and the defaults of the authors' class.
    """

    model_type = "molmo_text"
    embedding_size: int | None = 50304
    vocab_size: int = 50304
    layer_norm_eps: float = 1e-5
    layer_norm_type: str = "rms"
    qkv_bias: bool = False
    norm_after: bool = False
    attention_layer_norm: bool = False
    weight_tying: bool = False
    clip_qkv: float | None = None
    use_position_ids: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.vocab_size = self.embedding_size = self.embedding_size or self.vocab_size
        self.rms_norm_eps, self.tie_word_embeddings = self.layer_norm_eps, False
        needed = {"layer_norm_type": "rms", "weight_tying": False, "clip_qkv": None, "use_position_ids": True}
        require(self, {**needed, "hidden_act": "silu", "head_dim": self.hidden_size // self.num_attention_heads})


class MolmoForCausalLM(AuthorsNames, transformers.LlamaForCausalLM):  # type: ignore[misc]
    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    names: ClassVar[dict[str, dict[str, str]]] = {
        "MolmoForCausalLM": {"lm_head": "model.transformer.ff_out"},
        "LlamaModel": {"embed_tokens": "transformer.wte", "layers": "transformer.blocks", "norm": "transformer.ln_f"},
    }
    _num_marks: ClassVar[int] = 128  # tokens for images, behind those of text

    def change(self, module: Any) -> None:
        config = self.config
        if isinstance(module, LlamaModel):
            module.embed_tokens = nn.Embedding(config.vocab_size + self._num_marks, config.hidden_size)
        elif isinstance(module, LlamaDecoderLayer):
            self._change_attention(module)
            self._change_mlp(module)
            before, after = module.self_attn, module.mlp
            norms = [lambda: module.attn_norm], [lambda: module.ff_norm]
            module.attn_norm, module.ff_norm = module.input_layernorm, module.post_attention_layernorm
            before.o_proj = _Through(lambda: module.attn_out, *(norms[0] if config.norm_after else ()))
            after.down_proj = _Through(lambda: module.ff_out, *(norms[1] if config.norm_after else ()))
            module.input_layernorm = _Through(*(() if config.norm_after else norms[0]))
            module.post_attention_layernorm = _Through(*(() if config.norm_after else norms[1]))

    def _change_attention(self, layer: Any) -> None:
        config, attention = self.config, layer.self_attn
        for name, size in all_heads(attention).items():
            attention.add_module(name, nn.Linear(config.hidden_size, size, bias=config.qkv_bias))
        fuse(attention, "att_proj", all_heads(attention), layer)
        layer.attn_out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if config.attention_layer_norm:
            layer.q_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            layer.k_norm = LlamaRMSNorm(config.num_key_value_heads * attention.head_dim, config.rms_norm_eps)
            queries, keys = attention.q_proj, attention.k_proj
            attention.q_proj = _Through(lambda: queries, lambda: layer.q_norm)
            attention.k_proj = _Through(lambda: keys, lambda: layer.k_norm)

    def _change_mlp(self, layer: Any) -> None:
        size, width = self.config.hidden_size, self.config.intermediate_size // 2
        for name in ("up_proj", "gate_proj"):
            layer.mlp.add_module(name, nn.Linear(size, width, bias=False))
        fuse(layer.mlp, "ff_proj", {"up_proj": width, "gate_proj": width}, layer)
        layer.ff_out = nn.Linear(width, size, bias=False)


@strict
class PLaMo3Config(transformers.Gemma3TextConfig):  # type: ignore[misc]
    """PLaMo 3 is Gemma 3 with fused layers and other scales.

    Settings have the names and the defaults of the authors' class.
    """

    model_type = "plamo3"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 13312
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 2048
    eos_token_id: int | list[int] | None = 2
    bos_token_id: int | None = 1
    pad_token_id: int | None = None
    window_size: int = 128
    sliding_window: Any = None
    sliding_window_pattern: int = 8
    interleaved_sliding_window: list[int | None] | None = None
    rope_local_theta: float | int = 10_000
    rope_scaling_factor: float | int = 1
    initial_context_length: int | None = None
    scale_embedding: bool = False
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        theta = kwargs.pop("rope_theta", None) or kwargs.pop("rope_global_theta", None) or 150_000
        windows = self.interleaved_sliding_window
        if windows is None and isinstance(self.sliding_window, list):
            windows = self.sliding_window
        if windows is None:
            size = self.sliding_window or self.window_size
            pattern = range(1, self.num_hidden_layers + 1)
            windows = [size if number % self.sliding_window_pattern else None for number in pattern]
        sizes = {size for size in windows if size is not None}
        if len(sizes) > 1 or len(windows) != self.num_hidden_layers:
            raise ValueError(f"the windows of the {self.num_hidden_layers} layers must be one size, got {windows}")
        self.interleaved_sliding_window = windows
        self.sliding_window = max(sizes, default=None)
        self.layer_types = ["full_attention" if size is None else "sliding_attention" for size in windows]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if self.rope_scaling_factor != 1:
            rope = {**rope, "rope_type": "yarn", "factor": float(self.rope_scaling_factor), "truncate": False}
            rope |= {"beta_fast": 32.0, "beta_slow": 1.0}
            rope["original_max_position_embeddings"] = self.initial_context_length
        local = {"rope_type": "default", "rope_theta": self.rope_local_theta}
        if not (self.rope_parameters or {}).keys() & {"full_attention", "sliding_attention"}:
            self.rope_parameters = {"full_attention": rope, "sliding_attention": local}
        self.hidden_activation, self.query_pre_attn_scalar = "silu", self.head_dim
        super().__post_init__(**kwargs)
        require(self, {"scale_embedding": False, "attention_bias": False, "use_bidirectional_attention": False})


class _Layers(nn.Module):
    """Layers within one more module."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def __getitem__(self, places: slice) -> nn.Module:
        return self.layers[places]


class PLaMo3ForCausalLM(AuthorsNames, transformers.Gemma3ForCausalLM):  # type: ignore[misc]
    names: ClassVar[dict[str, dict[str, str]]] = {
        "Gemma3DecoderLayer": {
            "self_attn": "mixer",
            "input_layernorm": "pre_mixer_norm",
            "post_attention_layernorm": "post_mixer_norm",
            "pre_feedforward_layernorm": "pre_mlp_norm",
            "post_feedforward_layernorm": "post_mlp_norm",
        },
    }

    def change(self, module: Any) -> None:
        config = self.config
        if isinstance(module, transformers.Gemma3TextModel):
            module.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # which scales nothing
            module.layers = _Layers(module.layers)
        elif isinstance(module, Gemma3DecoderLayer):
            module.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps, offset=5**-1.0)
            module.post_feedforward_layernorm = _Norm(config.hidden_size, config.rms_norm_eps, offset=5**-1.5)
        elif isinstance(module, Gemma3Attention):
            fuse(module, "qkv_proj", all_heads(module))
        elif isinstance(module, Gemma3MLP):
            fuse(module, "gate_up_proj", dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size))


class K2HorizonConfig(transformers.LlamaConfig):  # type: ignore[misc]
    """K2 Horizon without experts is Llama with norms of groups, and perhaps with norms or gates in its attention.

    Settings have the names and the defaults of the authors' class.
    """

    model_type = "k2_horizon"
    head_dim: int | None = 128
    num_experts: int = 128
    mova_num_experts: int = 0
    query_key_norm: bool = True
    layernorm_num_groups: int = 1
    rope_head_dim: int | None = None
    attention_gate_func: str | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.sliding_window = None
        super().__post_init__(**kwargs)
        needed = {"num_experts": 0, "mova_num_experts": 0, "use_sliding_window": False, "hidden_act": "silu"}
        # vLLM reorders the values of heads that are rotated in part, so adapters would change others.
        require(self, {**needed, "mlp_bias": False, "rope_head_dim": self.rope_head_dim and self.head_dim})
        if self.attention_gate_func not in (None, *_GATES):
            raise ValueError(f"attention_gate_func must be one of {', '.join(_GATES)}, got {self.attention_gate_func}")
        self.mlp_only_layers = [*range(self.num_hidden_layers)]  # without these vLLM's MLP takes no adapters


_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "softplus": partial(nn.functional.softplus, beta=math.log(2)),
}


class _K2HorizonAttention(LlamaAttention):  # type: ignore[misc]
    def __init__(self, config: K2HorizonConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.query_key_norm:
            for name, num in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                self.add_module(f"{name}_norm", _Norm(num * self.head_dim, config.rms_norm_eps, num_groups=num))
        if config.attention_gate_func is not None:
            width = config.num_attention_heads * self.head_dim
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        queries, keys, values = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.config.query_key_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries, keys, values = (each.view(shape).transpose(1, 2) for each in (queries, keys, values))
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        found, weights = attend(self, queries, keys, values, attention_mask, scaling=self.scaling, **options)
        found = found.reshape(*hidden_states.shape[:-1], -1)
        if (gate := self.config.attention_gate_func) is not None:
            found = found * _GATES[gate](self.gate_proj(hidden_states))
        return self.o_proj(found), weights


class K2HorizonForCausalLM(AuthorsNames, transformers.LlamaForCausalLM):  # type: ignore[misc]
    names: ClassVar[dict[str, dict[str, str]]] = {}

    def change(self, module: Any) -> None:
        config = self.config
        norm = partial(_Norm, config.hidden_size, config.rms_norm_eps, num_groups=config.layernorm_num_groups)
        if isinstance(module, LlamaModel):
            module.norm = norm()
        elif isinstance(module, LlamaDecoderLayer):
            module.input_layernorm, module.post_attention_layernorm = norm(), norm()
            module.self_attn = _K2HorizonAttention(config, module.self_attn.layer_idx)


class _Bank(Qwen3_5MoeSparseMoeBlock):  # type: ignore[misc]
    """Experts and their router, without the shared expert."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.shared_expert, self.shared_expert_gate

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weights, chosen = self.gate(hidden_states)
        found: Tensor = self.experts(hidden_states, chosen, weights)
        return found


class _BesideBank(nn.Module):
    """The shared expert of a layer, whose other experts are in a bank."""

    def __init__(self, whole: Any, bank: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.shared_expert, self.shared_expert_gate = whole.shared_expert, whole.shared_expert_gate
        self._bank = bank

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        shared = self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        found: Tensor = self._bank()(x) + shared
        return found.view_as(hidden_states)


class InternS2MobiusForConditionalGeneration(transformers.Qwen3_5MoeForConditionalGeneration):  # type: ignore[misc]
    """Qwen 3.5 MoE, whose layers take their experts from a few banks, in turn."""

    def post_init(self) -> None:
        text = self.model.language_model
        num = text.config.num_blocks
        text.meta_mlp = nn.ModuleList(_Bank(text.config) for _ in range(num))
        for number, layer in enumerate(text.layers):
            layer.mlp = _BesideBank(layer.mlp, partial(text.meta_mlp.__getitem__, number % num))
        super().post_init()


_MARKS = [f"transformer.wte.{name}" for name in ("embedding", "new_embedding")]
register_checkpoint_conversion_mapping(
    "molmo", [WeightConverter(_MARKS, "transformer.wte.weight", operations=[Concatenate(dim=0)])]
)
