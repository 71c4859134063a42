"""Models that vLLM serves through another class than the one that their config.json names.

vLLM's class of the whole reads other settings or other names than transformers does, but its class of the language
model reads them. So vLLM gets the settings of the language model, and its weights under the names of that class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial, reduce
from typing import Any

from torch import Tensor, nn
from transformers import DeepseekV3Config, Ernie4_5_MoeConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import config_setting
from gpu_worker.model.checkpoint import find_quantised, read_config

FORMAT = "loraretriever"  # of `vllm_config.load_config`
_ERNIE_VL = "ernie4_5_vl_moe"
_MULTIMODAL = {
    *("blip-2", "cosmos3_omni", "moss_audio", "nemotron_h_omni", "openpangu_vl", "qwen3_asr", "voxtral"),
    _ERNIE_VL,
}
_CLASSES = {
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "PanguEmbedded": "PanguEmbeddedForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "mistral4": "MistralLarge3ForCausalLM",
    "ernie4_5_vl_moe_text": "Ernie4_5_MoeForCausalLM",  # without the experts for images
}
_AS_LLAMA = {"exaone"}  # the same but for the names of their tensors
# The language model's name in the whole model. Its parts may stand beside it.
_PART = re.compile(r"(?:model\.)?language_model\.|(?=(?:lm_head|model\.(?:embed_tokens|layers|norm))\.)")


def find_arguments(source: str, model_type: str) -> dict[str, Any]:
    """Return vLLM's arguments for a model that it serves through such a class, none for others.

    Raises: BaseModelUnsupported for quantised weights, which are described by their names in the whole.
    """
    config = read_config(source)
    text_config = config.get_text_config()
    kinds = config_setting(text_config, "layer_types") or ()
    if config.architectures == ["Rnj1ForCausalLM"] and "chunked_attention" not in kinds:
        return {"hf_overrides": {"architectures": ["Gemma3ForCausalLM"]}}  # the same without such layers
    if model_type == "axk1":  # its class asks for the number of dense layers, which come first
        return {"hf_overrides": {"first_k_dense_replace": config.mlp_layer_types.count("dense")}}
    if model_type == "param2moe":  # its class takes no other base of the rotary embedding than 10,000
        return {"hf_overrides": {"architectures": ["BailingMoeV2ForCausalLM"]}}
    if model_type in _AS_LLAMA:
        name = "LlamaForCausalLM"
    elif model_type in _MULTIMODAL or text_config.model_type == "mistral4":
        name = _CLASSES[text_config.model_type]
    else:
        return {}
    if find_quantised(config):
        raise BaseModelUnsupported(f"the vLLM engine does not support {model_type} with quantised weights")
    if rope := config_setting(text_config, "rope_parameters"):  # a token of text has one position
        text_config.rope_parameters = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    if model_type == _ERNIE_VL:
        text_config = _ernie_of_text(text_config)
    elif text_config.model_type == "mistral4":
        text_config = _mistral_large(text_config)
    text_config.update({"architectures": [name], "whole_family": model_type})
    if config_setting(config, "tie_word_embeddings"):  # the whole's counts
        text_config.update({"tie_word_embeddings": True})
    register_loader()
    return {"hf_overrides": partial(_replaced, text_config), "load_format": FORMAT, "language_model_only": False}


def _replaced(config: Any, _: Any) -> Any:
    return config


def _mistral_large(config: Any) -> DeepseekV3Config:
    """Return the settings of Mistral Large 3 as DeepSeek V3 has them."""
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    rope = {name: value for name, value in config.rope_parameters.items() if name != "partial_rotary_factor"}
    start, beta = rope["original_max_position_embeddings"], rope.pop("llama_4_scaling_beta")
    settings |= {
        "llama_4_scaling": {"original_max_position_embeddings": start, "beta": beta},
        "rope_parameters": rope,
        "scoring_func": "softmax",
    }
    return DeepseekV3Config(**settings)


def _ernie_of_text(config: Any) -> Ernie4_5_MoeConfig:
    """Return the settings of ERNIE 4.5 without experts for images. Raises: BaseModelUnsupported."""
    kinds, settings = config.mlp_layer_types, config.to_dict()
    first = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "dense" in kinds[first:]:
        raise BaseModelUnsupported("the vLLM engine serves ERNIE 4.5 VL only if its dense layers come first")
    del settings["model_type"]
    settings |= {"moe_intermediate_size": config.moe_intermediate_size[0], "moe_layer_start_index": first}
    return Ernie4_5_MoeConfig(**settings)


def _ernie_weight(name: str, tensor: Tensor, num_experts: int) -> tuple[str | None, Tensor]:
    """Return a weight as it is without experts for images, which come after those for text. No name if it is theirs."""
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if name.endswith(".gate.weight_1") or (expert is not None and int(expert[1]) >= num_experts):
        return None, tensor
    if name.endswith(".gate.weight"):
        return name, tensor.mT
    return name, tensor[:1] if name.endswith(".e_score_correction_bias") else tensor


def _find_renaming(family: str) -> Callable[[str], str]:
    """Return what gives a tensor of the files the name that it has in transformers."""
    mapping = get_checkpoint_conversion_mapping(family) or ()
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    return lambda name: reduce(lambda found, renaming: str(renaming.rename_source_key(found)[0]), renamings, name)


def name_in_part(name: str) -> str | None:
    """Return the name of a checkpoint's tensor in the language model, None if it is of another part."""
    found = _PART.match(name)
    if found is None:
        return None
    name = name[found.end() :]
    return name if name.startswith(("model.", "backbone.", "lm_head.")) else f"model.{name}"


class LanguageModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads the language model's weights, all of them, and leaves the other parts out."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="hf"))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        config = model_config.hf_config
        rename = _find_renaming(config.whole_family)
        for found, tensor in super().get_all_weights(model_config, model):
            name: str | None = rename(found)
            if config.whole_family not in _AS_LLAMA:
                name = name_in_part(rename(found))
            if config.whole_family == _ERNIE_VL and name is not None:
                name, tensor = _ernie_weight(name, tensor, config.moe_num_experts)
            if name is not None:
                yield name, tensor

    def track_weights_loading(self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False) -> None:
        super().track_weights_loading(model, loaded_weights, quantized=True)  # which leaves no layer out


@cache
def register_loader() -> None:
    """Let this process's vLLM find the loader, once. vLLM logs it, so processes do it only for such a model."""
    register_model_loader(FORMAT)(LanguageModelLoader)
