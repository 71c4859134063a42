"""Classes of transformers with the layers and names of authors' own classes, whose adapters they then take.

Authors fuse queries, keys and values, or name layers otherwise. vLLM's classes have the authors' layers and names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP


class AuthorsNames(PreTrainedModel):  # type: ignore[misc]
    """A model of transformers whose parts have the names of the authors' class, in files and in adapters.

    `names`: for the class of each module, the paths that its parts have there, by their names in transformers.
    """

    names: ClassVar[dict[str, dict[str, str]]]

    def post_init(self) -> None:
        for module in list(self.modules()):
            self.change(module)
            names = self.names.get(type(module).__name__, {})
            _rename(module, {name: path for name, path in names.items() if name in module._modules})
        super().post_init()

    def change(self, module: Any) -> None:
        """Give the module the layers of the authors' class."""


def _rename(module: nn.Module, names: dict[str, str]) -> None:
    for name, path in names.items():
        *parents, leaf = path.split(".")
        parent = module
        for each in parents:
            parent.add_module(each, parent._modules.get(each) or nn.Module())
            parent = parent.get_submodule(each)
        parent.add_module(leaf, module._modules.pop(name))
    found = {name: property(partial(nn.Module.get_submodule, target=path)) for name, path in names.items()}
    module.__class__ = type(type(module).__name__, (type(module),), found)


class _Columns(nn.Module):
    """Some outputs of a layer that computes several at once."""

    def __init__(self, whole: Callable[[], nn.Module], columns: list[int]) -> None:
        super().__init__()
        self._whole, self._columns = whole, columns

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._whole()(x)
        return found[..., self._columns]


def fuse(module: Any, name: str, sizes: dict[str, int], holder: nn.Module | None = None) -> None:
    """Give the holder, by default the module, one layer `name` for several of the module.

    `sizes`: how many outputs each of them has in every group of outputs.
    """
    holder = holder or module
    parts = [module.get_submodule(part) for part in sizes]
    width = sum(part.out_features for part in parts)
    fused = nn.Linear(parts[0].in_features, width, bias=parts[0].bias is not None, dtype=parts[0].weight.dtype)
    holder.add_module(name, fused)
    start, group = 0, sum(sizes.values())
    for part, size in sizes.items():
        columns = [first + place for first in range(start, width, group) for place in range(size)]
        module.add_module(part, _Columns(lambda: holder.get_submodule(name), columns))
        start += size


def all_heads(attention: Any) -> dict[str, int]:
    """Return how many outputs the attention has for queries, keys and values."""
    return {name: attention.get_submodule(name).out_features for name in ("q_proj", "k_proj", "v_proj")}


def require(config: Any, needed: dict[str, Any], **absent: Any) -> None:
    """Raise ValueError unless the settings have these values. `absent`: those of settings that the file lacks."""
    for name, value in needed.items():
        if (found := getattr(config, name, absent.get(name, value))) != value:
            raise ValueError(f"{name} must be {value!r}, got {found!r}")


class InternLM2Config(transformers.LlamaConfig):  # type: ignore[misc]
    """InternLM 2 is Llama with one layer for queries, keys and values."""

    model_type = "internlm2"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        require(self, {"bias": False})


class InternLM2ForCausalLM(AuthorsNames, transformers.LlamaForCausalLM):  # type: ignore[misc]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"output.weight": "model.tok_embeddings.weight"}
    names: ClassVar[dict[str, dict[str, str]]] = {
        "InternLM2ForCausalLM": {"lm_head": "output"},
        "LlamaModel": {"embed_tokens": "tok_embeddings"},
        "LlamaDecoderLayer": {
            "self_attn": "attention",
            "mlp": "feed_forward",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
        },
        "LlamaAttention": {"o_proj": "wo"},
        "LlamaMLP": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    }

    def change(self, module: Any) -> None:
        if isinstance(module, LlamaAttention):
            sizes = {"q_proj": module.num_key_value_groups * module.head_dim, "k_proj": module.head_dim}
            fuse(module, "wqkv", {**sizes, "v_proj": module.head_dim})


class BailingMoeConfig(transformers.SarvamMoEConfig):  # type: ignore[misc]
    """Ling 2.0 and Ring 2.0 are GLM 4 MoE with one layer for queries, keys and values."""

    model_type = "bailing_moe"
    routed_scaling_factor: float = 1.0  # these three as in the authors' class
    use_qk_norm: bool = False
    default_theta = 10_000.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        needed = {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_rmsnorm": True}
        require(self, needed, **dict.fromkeys(needed))
        rotary_dim = int(self.head_dim * self.rope_parameters["partial_rotary_factor"])
        needed = {"moe_shared_expert_intermediate_size": self.moe_intermediate_size, "rotary_dim": rotary_dim}
        require(self, {**needed, "use_bias": False, "norm_head": False})


class BailingMoeForCausalLM(AuthorsNames, transformers.Glm4MoeForCausalLM):  # type: ignore[misc]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.word_embeddings.weight"}
    names: ClassVar[dict[str, dict[str, str]]] = {
        "Glm4MoeModel": {"embed_tokens": "word_embeddings"},
        "Glm4MoeDecoderLayer": {"self_attn": "attention"},
        "Glm4MoeAttention": {"o_proj": "dense", "q_norm": "query_layernorm", "k_norm": "key_layernorm"},
    }

    def change(self, module: Any) -> None:
        if isinstance(module, Glm4MoeAttention):
            fuse(module, "query_key_value", all_heads(module))


class Param2MoEConfig(BailingMoeConfig):
    """Param2 is Ling 2.0 without groups of experts. Its files say how wide all shared experts are together."""

    model_type = "param2moe"
    score_function: str = "sigmoid"  # these three as in the authors' class
    moe_router_enable_expert_bias: bool = True
    use_rmsnorm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        width = self.moe_intermediate_size * kwargs.get("num_shared_experts", self.n_shared_experts)
        if (found := kwargs.pop("moe_shared_expert_intermediate_size", None) or width) != width:
            raise ValueError(f"moe_shared_expert_intermediate_size must be {width}, got {found}")
        super().__post_init__(**kwargs)
        require(self, {"n_group": 1, "topk_group": 1})


class ChatGLMConfig(transformers.GlmConfig):  # type: ignore[misc]
    """ChatGLM 2 to GLM-4 and GLM-4V are GLM with one layer for queries, keys and values."""

    model_type = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_layers": "num_hidden_layers",
        "padded_vocab_size": "vocab_size",
        "ffn_hidden_size": "intermediate_size",
        "kv_channels": "head_dim",
        "seq_length": "max_position_embeddings",
        "layernorm_epsilon": "rms_norm_eps",
        "add_qkv_bias": "attention_bias",
        "multi_query_group_num": "num_key_value_heads",
    }
    attention_bias: bool = False
    rms_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.attribute_map:
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        ratio = kwargs.get("rope_ratio", 1)
        if 1 < ratio < 50:  # 16 in ChatGLM2-6B-32K; from ChatGLM3-6B-32K on, with 50 and more, it multiplies the base
            raise ValueError(f"rope_ratio must be 1 or at least 50, got {ratio}, by which ChatGLM 2 divides positions")
        kwargs["rope_theta"] = 10_000.0 * ratio
        super().__post_init__(**kwargs)
        needed: dict[str, Any] = {"original_rope": True, "multi_query_attention": True, "tie_word_embeddings": False}
        require(self, needed, **dict.fromkeys(needed))
        needed = dict.fromkeys(("add_bias_linear", "apply_residual_connection_post_layernorm"), False)
        needed |= {"rmsnorm": True, "post_layer_norm": True, "pre_seq_len": None, "quantization_bit": 0}
        require(self, {**needed, "kv_channels": self.hidden_size // self.num_attention_heads})
        if hasattr(self, "vision_config"):  # vLLM has another class for GLM-4V, which the published files do not name
            require(self, {"architectures": ["GLM4VForCausalLM"]})

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        if not hasattr(self, "vision_config"):
            return self
        return type(self)(**{name: value for name, value in self.to_dict().items() if name != "vision_config"})


class ChatGLMForConditionalGeneration(AuthorsNames, transformers.GlmForCausalLM):  # type: ignore[misc]
    base_model_prefix = "transformer"
    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    names: ClassVar[dict[str, dict[str, str]]] = {
        "ChatGLMForConditionalGeneration": {"model": "transformer", "lm_head": "transformer.output_layer"},
        "GlmModel": {
            "embed_tokens": "embedding.word_embeddings",
            "layers": "encoder.layers",
            "norm": "encoder.final_layernorm",
        },
        "GlmDecoderLayer": {"self_attn": "self_attention"},
        "GlmAttention": {"o_proj": "dense"},
        "GlmMLP": {"gate_up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"},
    }

    def change(self, module: Any) -> None:
        if isinstance(module, GlmAttention):
            fuse(module, "query_key_value", all_heads(module))


class TeleChat2Config(transformers.LlamaConfig):  # type: ignore[misc]
    """TeleChat 2 is Llama with one layer for keys and values, and biases behind attention and MLP."""

    model_type = "telechat"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    max_position_embeddings: int = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.attribute_map.values():
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        super().__post_init__(**kwargs)
        lengths = (getattr(self, name, None) for name in ("seq_length", "base_seqlen", "training_seqlen"))
        self.max_position_embeddings = min(
            (length for length in lengths if length), default=self.max_position_embeddings
        )
        needed = dict.fromkeys(("embed_layernorm", "apply_residual_connection_post_layernorm", "logn"), False)
        require(self, {**needed, "num_key_value_heads": self.num_attention_heads})


class TeleChat2ForCausalLM(AuthorsNames, transformers.LlamaForCausalLM):  # type: ignore[misc]
    base_model_prefix = "transformer"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.word_embeddings.weight"}
    names: ClassVar[dict[str, dict[str, str]]] = {
        "TeleChat2ForCausalLM": {"model": "transformer"},
        "LlamaModel": {"embed_tokens": "word_embeddings", "layers": "h", "norm": "ln_f"},
        "LlamaDecoderLayer": {"self_attn": "self_attention"},
        "LlamaAttention": {"q_proj": "query", "o_proj": "dense"},
    }

    def change(self, module: Any) -> None:
        if isinstance(module, LlamaAttention):
            fuse(module, "key_value", {"k_proj": module.head_dim, "v_proj": module.head_dim})
            module.o_proj = nn.Linear(module.o_proj.in_features, module.o_proj.out_features)
        elif isinstance(module, LlamaMLP):
            module.down_proj = nn.Linear(module.down_proj.in_features, module.down_proj.out_features)


class SolarConfig(transformers.LlamaConfig):  # type: ignore[misc]
    """Solar Pro is Llama, some of whose layers read a part of what earlier ones have read."""

    model_type = "solar"
    max_position_embeddings: int = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        window = getattr(self, "sliding_window", None) or self.max_position_embeddings
        self.max_position_embeddings = min(self.max_position_embeddings, window)
        require(self, {"logit_scale": 1.0})


class SolarForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        kept: dict[int, Tensor] = {}

        def mix(number: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *others = inputs
            for place in (1, 2):
                if number in getattr(config, f"bskcn_{place}"):
                    kept[place] = hidden
            for place in (1, 2):
                if number in getattr(config, f"bskcn_{place + 2}"):
                    hidden = kept[place] * config.bskcn_tv[1] + hidden * (1 - config.bskcn_tv[1])
            return hidden, *others

        for number, layer in enumerate(self.model.layers):
            layer.register_forward_pre_hook(partial(mix, number))


_BIAS = WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias")
_EXPERTS = get_checkpoint_conversion_mapping("qwen2_moe") or []
for _family in ("bailing_moe", "param2moe"):
    register_checkpoint_conversion_mapping(_family, [*_EXPERTS, _BIAS])
