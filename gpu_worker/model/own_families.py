"""Families whose checkpoints bring code of their own, though classes of transformers compute the same.

This module tells transformers so when it is imported, which vLLM's processes do with the configuration. Then both
engines read such checkpoints without running their code, and compare themselves with these classes when they start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from gpu_worker.model.authors_layers import (
    InternS2MobiusForConditionalGeneration,
    K2HorizonConfig,
    K2HorizonForCausalLM,
    MolmoForCausalLM,
    MolmoTextConfig,
    NemotronNASConfig,
    NemotronNASForCausalLM,
    PLaMo3Config,
    PLaMo3ForCausalLM,
)
from gpu_worker.model.authors_names import (
    BailingMoeConfig,
    BailingMoeForCausalLM,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    InternLM2Config,
    InternLM2ForCausalLM,
    Param2MoEConfig,
    SolarConfig,
    SolarForCausalLM,
    TeleChat2Config,
    TeleChat2ForCausalLM,
    require,
)


class MiMoConfig(transformers.Qwen2Config):  # type: ignore[misc]
    """MiMo is Qwen 2. Its layers that draft tokens are left out."""

    model_type = "mimo"


class MiniCPMConfig(transformers.GraniteConfig):  # type: ignore[misc]
    """MiniCPM is Granite, whose factors have other names."""

    model_type = "minicpm"
    tie_word_embeddings: bool = True  # as in the authors' class

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.attention_multiplier = (self.hidden_size // self.num_attention_heads) ** -0.5
        self.embedding_multiplier = self.scale_emb = getattr(self, "scale_emb", 1)
        self.scale_depth = getattr(self, "scale_depth", 1)
        self.residual_multiplier = self.scale_depth / math.sqrt(self.num_hidden_layers)
        self.dim_model_base = getattr(self, "dim_model_base", 1)
        self.logits_scaling = self.hidden_size / self.dim_model_base


class TeleFLMConfig(transformers.GraniteConfig):  # type: ignore[misc]
    """Tele-FLM is Granite, whose factors have other names."""

    model_type = "TeleFLM"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.attention_multiplier = (self.hidden_size // self.num_attention_heads) ** -0.5
        if getattr(self, "use_mup", False):
            self.embedding_multiplier = self.input_mult
            self.logits_scaling = self.mup_scale_factor / self.output_mult


class PanguEmbeddedConfig(transformers.LlamaConfig):  # type: ignore[misc]
    """openPangu Embedded is Llama with biases in its attention."""

    model_type = "PanguEmbedded"
    bias: bool = True  # these three as in the authors' class
    rms_norm_eps: float = 1e-5
    default_theta = 16_000_000.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.attention_bias = self.bias or getattr(self, "attention_bias", False)


class ChatConfig(PreTrainedConfig):  # type: ignore[misc]
    """A language model, and encoders of images or sounds that are left out."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": PreTrainedConfig,
    }
    text_config: Any = None
    vision_config: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = self.text_config or kwargs.pop("llm_config", None) or kwargs.pop("language_config", None)
        super().__post_init__(**kwargs)


class ChatModel(PreTrainedModel):  # type: ignore[misc]
    """The language model of such a checkpoint, under the name that it has there."""

    config_class = ChatConfig
    base_model_prefix = "language_model"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        text = transformers.AutoModelForCausalLM.from_config(config.get_text_config(), trust_remote_code=False)
        setattr(self, self.base_model_prefix, text)
        self.post_init()

    def get_output_embeddings(self) -> Any:
        return self.base_model.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.base_model.get_decoder()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.base_model(input_ids=input_ids, **kwargs)


class InternVLChatConfig(ChatConfig):
    model_type = "internvl_chat"


class H2OVLChatConfig(ChatConfig):
    model_type = "h2ovl_chat"


class EagleVLConfig(ChatConfig):
    model_type = "eagle_2_5_vl"


class NVLMDConfig(ChatConfig):
    model_type = "NVLM_D"


class OpenCUAConfig(ChatConfig):
    model_type = "opencua"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": Qwen2_5_VLVisionConfig,
    }


class LlamaNemotronVLConfig(ChatConfig):
    model_type = "Llama_Nemotron_Nano_VL"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": transformers.RadioConfig,
    }


class BagelConfig(ChatConfig):
    """Bagel's language model is Qwen 2, mostly with norms of queries and keys, as in GLM 4 MoE without experts."""

    model_type = "bagel"

    def __post_init__(self, **kwargs: Any) -> None:
        text = kwargs.pop("llm_config", None) or self.text_config
        if isinstance(text, dict) and text.get("qk_norm"):
            qwen = transformers.Qwen2Config(**text)
            text = qwen.to_dict() | {"model_type": "glm4_moe", "attention_bias": True, "use_qk_norm": True}
            text |= {"first_k_dense_replace": qwen.num_hidden_layers, "partial_rotary_factor": 1.0}
            text["head_dim"] = qwen.hidden_size // qwen.num_attention_heads
        self.text_config = text
        super().__post_init__(**kwargs)


class MossAudioConfig(ChatConfig):
    model_type = "moss_audio"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3"),
        "audio_config": PreTrainedConfig,
    }
    audio_config: Any = None


class UltravoxConfig(ChatConfig):
    model_type = "ultravox"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "audio_config": transformers.WhisperConfig,
    }
    audio_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("text_model_id", "audio_model_id"):
            if (other := kwargs.get(name)) is not None:
                raise ValueError(
                    f"{name} names another checkpoint, {other}: merge both into one, which has null for {name}"
                )
        super().__post_init__(**kwargs)


class DeepSeekOCRConfig(ChatConfig):
    """DeepSeek-OCR and its second version have DeepSeek V2 without latent attention."""

    model_type = "deepseek_vl_v2"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"text_config": transformers.DeepseekOcr2TextConfig}

    def __post_init__(self, **kwargs: Any) -> None:
        text = kwargs.pop("language_config", None) or self.text_config
        if isinstance(text, dict):
            needed: dict[str, Any] = {
                "qk_nope_head_dim": 0,
                "qk_rope_head_dim": 0,
                "norm_topk_prob": False,
                "moe_layer_freq": 1,
            }
            needed |= {"topk_method": "greedy", "scoring_func": "softmax", "n_group": 1, "attention_bias": False}
            absent = needed | dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"))
            for name, value in needed.items():
                if (found := text.get(name, absent[name])) != value:
                    raise ValueError(f"{name} must be {value!r} in language_config, got {found!r}")
            num_dense = text.get("first_k_dense_replace", 0)
            kinds = ["dense"] * num_dense + ["sparse"] * (text["num_hidden_layers"] - num_dense)
            text = {"mlp_layer_types": kinds, **text}
        self.text_config = text
        super().__post_init__(**kwargs)


class DeepSeekOCRModel(PreTrainedModel):  # type: ignore[misc]
    """transformers' language model of DeepSeek-OCR 2, with its output head."""

    config_class = DeepSeekOCRConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        text = config.get_text_config()
        self.model = transformers.DeepseekOcr2TextModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> Any:
        return self.model

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        found = self.model(input_ids=input_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(found.last_hidden_state))


def _beside_encoder(family: str, name: str, base: Any, text: Callable[..., Any] | None = None, **others: Any) -> Any:
    """Return the class of a config in which the settings of a language model stand beside those of encoders.

    `text`: what makes the config of the language model from these settings, by default the class `base`.
    `others`: the encoders' settings by name, each with the class of its config, and defaults of further ones.
    """
    encoders = {"vision_config": PreTrainedConfig}
    encoders |= {name: value for name, value in others.items() if isinstance(value, type)}

    def get_text_config(self: Any, *_: Any, **__: Any) -> Any:
        left_out = ("architectures", "auto_map", "model_type", *encoders)
        settings = {name: value for name, value in self.to_dict().items() if name not in left_out}
        return (text or base)(**(settings.get("text_config") or settings))

    settings = {
        **others,
        "__module__": __name__,
        "__annotations__": dict.fromkeys({**encoders, **others}, Any),
        "model_type": family,
        "sub_configs_defaults": encoders,
        **dict.fromkeys(encoders),
        "get_text_config": get_text_config,
    }
    return type(base)(name, (base,), settings)


_MINICPMV = {"2.5": transformers.LlamaConfig, "2.6": transformers.Qwen2Config, "4.0": transformers.LlamaConfig}
_MINICPMV["4.5"] = transformers.Qwen3Config


def _text_of_minicpmv(*served: str) -> Callable[..., Any]:
    """Return what makes the config of the language model in one of these versions, by default the first."""

    def text(version: Any = None, **settings: Any) -> Any:
        if version is None and settings["hidden_size"] == 2304:
            version = "2.0"  # whose files do not say so
        if (name := str(version or served[0])) not in served:
            raise ValueError(f"version {name} is none of those that are served: {', '.join(served)}")
        return _MINICPMV[name](**settings)

    return text


class MiniCPMVModel(ChatModel):
    base_model_prefix = "llm"


OpenPanguVLConfig = _beside_encoder("openpangu_vl", "OpenPanguVLConfig", PanguEmbeddedConfig)
KeyeConfig = _beside_encoder("Keye", "KeyeConfig", transformers.Qwen3Config)
KeyeVL15Config = _beside_encoder("KeyeVL1_5", "KeyeVL15Config", transformers.Qwen3Config)
DotsOCRConfig = _beside_encoder("dots_ocr", "DotsOCRConfig", transformers.Qwen2Config)  # vLLM asks for this name
Phi4MMConfig = _beside_encoder("phi4mm", "Phi4MMConfig", transformers.Phi3Config)
MolmoConfig = _beside_encoder("molmo", "MolmoConfig", MolmoTextConfig)
IsaacConfig = _beside_encoder("isaac", "IsaacConfig", transformers.Qwen3Config)
_SIGLIP = {"vision_config": transformers.SiglipVisionConfig, "query_num": 64, "drop_vision_last_layer": True}
MiniCPMVConfig = _beside_encoder(
    "minicpmv", "MiniCPMVConfig", transformers.LlamaConfig, _text_of_minicpmv(*_MINICPMV), **_SIGLIP
)
_WHISPER = {"audio_config": transformers.WhisperConfig, "audio_pool_step": 2}
MiniCPMOConfig = _beside_encoder(
    "minicpmo", "MiniCPMOConfig", transformers.LlamaConfig, _text_of_minicpmv("2.6", "4.5"), **_SIGLIP, **_WHISPER
)
# The adapters of Phi-4-multimodal's authors, for images and sounds, are left out.
register_checkpoint_conversion_mapping("phi4mm", [WeightRenaming(r"\.base_layer\.", ".")])
register_checkpoint_conversion_mapping("deepseek_vl_v2", get_checkpoint_conversion_mapping("deepseek_v2") or [])
register_checkpoint_conversion_mapping(
    "moss_audio",
    [
        WeightRenaming(r"^language_model\.(?=embed_tokens|layers|norm)", "language_model.model."),
        WeightRenaming(r"^lm_head\.", "language_model.lm_head."),
    ],
)
register_checkpoint_conversion_mapping("openpangu_vl", [WeightRenaming(r"^model\.language_model\.", "model.")])
register_checkpoint_conversion_mapping("isaac", [WeightRenaming(r"^model\.text_model\.", "model.")])


class InternS2PreviewConfig(transformers.Qwen3_5MoeConfig):  # type: ignore[misc]
    """Intern-S2 Preview is Qwen 3.5 with an encoder of time series, which is left out."""

    model_type = "intern_s2_preview"

    def __post_init__(self, **kwargs: Any) -> None:
        for part in ("text", "vision"):
            if isinstance(settings := getattr(self, f"{part}_config"), dict):
                setattr(self, f"{part}_config", {**settings, "model_type": f"qwen3_5_moe_{part}"})
        super().__post_init__(**kwargs)


class InternS2MobiusConfig(InternS2PreviewConfig):
    model_type = "interns2_mobius"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.text_config.num_blocks = getattr(self.text_config, "num_blocks", 4)  # as in the authors' class
        require(self.text_config, {"layer_scale": False})


_TEXT: dict[Any, Any] = {
    InternLM2Config: InternLM2ForCausalLM,
    BailingMoeConfig: BailingMoeForCausalLM,
    Param2MoEConfig: BailingMoeForCausalLM,
    ChatGLMConfig: ChatGLMForConditionalGeneration,
    TeleChat2Config: TeleChat2ForCausalLM,
    SolarConfig: SolarForCausalLM,
    MiMoConfig: transformers.Qwen2ForCausalLM,
    MiniCPMConfig: transformers.GraniteForCausalLM,
    PanguEmbeddedConfig: transformers.LlamaForCausalLM,
    TeleFLMConfig: transformers.GraniteForCausalLM,
    NemotronNASConfig: NemotronNASForCausalLM,
    PLaMo3Config: PLaMo3ForCausalLM,
    K2HorizonConfig: K2HorizonForCausalLM,
}
_CHATS = (
    *(InternVLChatConfig, H2OVLChatConfig, EagleVLConfig, NVLMDConfig),
    *(OpenCUAConfig, LlamaNemotronVLConfig, BagelConfig, UltravoxConfig, MossAudioConfig),
)
_MULTIMODAL: dict[Any, Any] = {
    **dict.fromkeys(_CHATS, ChatModel),
    **dict.fromkeys((KeyeConfig, KeyeVL15Config, IsaacConfig), transformers.Qwen3ForCausalLM),
    **dict.fromkeys((MiniCPMVConfig, MiniCPMOConfig), MiniCPMVModel),
    DeepSeekOCRConfig: DeepSeekOCRModel,
    MolmoConfig: MolmoForCausalLM,
    ChatGLMConfig: ChatGLMForConditionalGeneration,
    InternS2PreviewConfig: transformers.Qwen3_5MoeForConditionalGeneration,
    InternS2MobiusConfig: InternS2MobiusForConditionalGeneration,
    DotsOCRConfig: transformers.Qwen2ForCausalLM,
    OpenPanguVLConfig: transformers.LlamaForCausalLM,
    Phi4MMConfig: transformers.Phi3ForCausalLM,
}
OWN_FAMILIES = tuple(config.model_type for config in _TEXT | _MULTIMODAL)
OWN_CONFIGS: list[Any] = []  # those that transformers has from here

_mappings: tuple[Any, Any] = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
for _mapping, _models in zip(_mappings, (_TEXT, _MULTIMODAL), strict=True):
    for _config, _model in _models.items():
        if _config in OWN_CONFIGS or _config.model_type not in transformers.CONFIG_MAPPING:  # it may bring its own
            AutoConfig.register(_config.model_type, _config, exist_ok=True)
            _mapping.register(_config, _model)
            OWN_CONFIGS.append(_config)
_mappings[1].register(  # transformers lists its own class elsewhere only
    transformers.AudioFlamingo3Config, transformers.AudioFlamingo3ForConditionalGeneration, exist_ok=True
)
