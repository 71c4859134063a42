"""Families whose checkpoints bring code of their own, though classes of transformers compute the same.

This module tells transformers so when it is imported, which vLLM's processes do with the configuration. Then both
engines read such checkpoints without running their code, and compare themselves with these classes when they start.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming


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
    """A language model, and an encoder of images that is left out."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": PreTrainedConfig,
    }
    text_config: Any = None
    vision_config: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = self.text_config or kwargs.pop("llm_config", None)
        super().__post_init__(**kwargs)


class ChatModel(PreTrainedModel):  # type: ignore[misc]
    """The language model of such a checkpoint, under the name that it has there."""

    config_class = ChatConfig
    base_model_prefix = "language_model"

    def __init__(self, config: ChatConfig) -> None:
        super().__init__(config)
        self.language_model = transformers.AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.language_model(input_ids=input_ids, **kwargs)


class InternVLChatConfig(ChatConfig):
    model_type = "internvl_chat"


class H2OVLChatConfig(ChatConfig):
    model_type = "h2ovl_chat"


class EagleVLConfig(ChatConfig):
    model_type = "eagle_2_5_vl"


class NVLMDConfig(ChatConfig):
    model_type = "NVLM_D"


def _beside_encoder(family: str, name: str, text: Any) -> Any:
    """Return the class of a config in which the settings of a language model stand beside those of an encoder."""

    def get_text_config(self: Any, *_: Any, **__: Any) -> Any:
        others = ("architectures", "auto_map", "model_type", "vision_config")
        return text(**{name: value for name, value in self.to_dict().items() if name not in others})

    settings = {
        "__module__": __name__,
        "__annotations__": {"vision_config": Any},
        "model_type": family,
        "sub_configs_defaults": {"vision_config": PreTrainedConfig},
        "vision_config": None,
        "get_text_config": get_text_config,
    }
    return type(text)(name, (text,), settings)


KeyeConfig = _beside_encoder("Keye", "KeyeConfig", transformers.Qwen3Config)
KeyeVL15Config = _beside_encoder("KeyeVL1_5", "KeyeVL15Config", transformers.Qwen3Config)
DotsOCRConfig = _beside_encoder("dots_ocr", "DotsOCRConfig", transformers.Qwen2Config)  # vLLM asks for this name
Phi4MMConfig = _beside_encoder("phi4mm", "Phi4MMConfig", transformers.Phi3Config)
# The adapters of Phi-4-multimodal's authors, for images and sounds, are left out.
register_checkpoint_conversion_mapping("phi4mm", [WeightRenaming(r"\.base_layer\.", ".")])

_TEXT: dict[Any, Any] = {
    MiMoConfig: transformers.Qwen2ForCausalLM,
    MiniCPMConfig: transformers.GraniteForCausalLM,
    PanguEmbeddedConfig: transformers.LlamaForCausalLM,
    TeleFLMConfig: transformers.GraniteForCausalLM,
}
_CHATS = (InternVLChatConfig, H2OVLChatConfig, EagleVLConfig, NVLMDConfig)
_MULTIMODAL: dict[Any, Any] = {
    **dict.fromkeys(_CHATS, ChatModel),
    **dict.fromkeys((KeyeConfig, KeyeVL15Config), transformers.Qwen3ForCausalLM),
    DotsOCRConfig: transformers.Qwen2ForCausalLM,
    Phi4MMConfig: transformers.Phi3ForCausalLM,
}
OWN_FAMILIES = tuple(config.model_type for config in (*_TEXT, *_MULTIMODAL))

_mappings: tuple[Any, Any] = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
for _mapping, _models in zip(_mappings, (_TEXT, _MULTIMODAL), strict=True):
    for _config, _model in _models.items():
        if _config.model_type not in transformers.CONFIG_MAPPING:  # a later transformers may bring its own
            AutoConfig.register(_config.model_type, _config)
            _mapping.register(_config, _model)
_mappings[1].register(  # transformers lists its own class elsewhere only
    transformers.AudioFlamingo3Config, transformers.AudioFlamingo3ForConditionalGeneration, exist_ok=True
)
