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
from transformers import Ernie4_5_MoeConfig
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
_ERNIE_VL, _MOLMO2 = "ernie4_5_vl_moe", "molmo2"
_MULTIMODAL = {
    *("blip-2", "cosmos3_omni", "moss_audio", "nemotron_h_omni", "openpangu_vl", "qwen3_asr", "voxtral"),
    *(_ERNIE_VL, _MOLMO2),
}
_CLASSES = {
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "PanguEmbedded": "PanguEmbeddedForCausalLM",
    **dict.fromkeys(("molmo2_text", "qwen3_vl_text"), "Qwen3ForCausalLM"),
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
        return {"hf_overrides": {"first_k_dense_replace": _count_dense(config)}}
    if model_type == "param2moe":  # its class takes no other base of the rotary embedding than 10,000
        return {"hf_overrides": {"architectures": ["BailingMoeV2ForCausalLM"]}}
    if model_type not in _AS_LLAMA | _MULTIMODAL:
        return {}
    name = "LlamaForCausalLM" if model_type in _AS_LLAMA else _CLASSES.get(text_config.model_type)
    if name is None or find_quantised(config):
        what = "quantised weights" if name else f"a language model of {text_config.model_type}"
        raise BaseModelUnsupported(f"the vLLM engine does not support {model_type} with {what}")
    if rope := config_setting(text_config, "rope_parameters"):  # a token of text has one position
        text_config.rope_parameters = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    if model_type == _ERNIE_VL:
        text_config = _ernie_of_text(text_config)
    elif model_type == _MOLMO2:
        _check_molmo2(text_config)
    is_tied = any(config_setting(each, "tie_word_embeddings") for each in (config, text_config))  # the whole's counts
    text_config.update({"architectures": [name], "whole_family": model_type, "tie_word_embeddings": bool(is_tied)})
    register_loader()
    return {"hf_overrides": partial(_replaced, text_config), "load_format": FORMAT, "language_model_only": False}


def _replaced(config: Any, _: Any) -> Any:
    return config


def _ernie_of_text(config: Any) -> Ernie4_5_MoeConfig:
    """Return the settings of ERNIE 4.5 without experts for images."""
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    settings |= {
        "moe_intermediate_size": config.moe_intermediate_size[0],
        "moe_layer_start_index": _count_dense(config),
    }
    return Ernie4_5_MoeConfig(**settings)


def _count_dense(config: Any) -> int:
    """Return how many layers without experts come first. Raises: BaseModelUnsupported if others come later."""
    kinds: list[str] = config.mlp_layer_types
    if kinds != sorted(kinds):
        raise BaseModelUnsupported(f"the vLLM engine serves {config.model_type} only if its dense layers come first")
    return kinds.count("dense")


def _check_molmo2(config: Any) -> None:
    """Raise BaseModelUnsupported unless the language model computes as Qwen 3."""
    is_qwen3 = config.qk_norm_type == "qwen3" and not config.norm_after
    num_scaled = len(config.rope_scaling_layers)
    if not is_qwen3 or (config.rope_parameters["rope_type"] != "default" and num_scaled < config.num_hidden_layers):
        raise BaseModelUnsupported("the vLLM engine serves molmo2 only if its language model is that of Qwen 3")


def _read_by_vllm(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor of the language model as vLLM's class reads it, none if it is for images."""
    layer, _, leaf = name.removesuffix(".weight").rpartition(".")
    if config.whole_family == _ERNIE_VL:  # experts for images come after those for text
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if leaf != "weight_1" and (expert is None or int(expert[1]) < config.moe_num_experts):
            yield name, tensor.mT if leaf == "gate" else tensor[:1] if leaf == "e_score_correction_bias" else tensor
    elif leaf == "ff_proj":
        for part, weight in zip(("up_proj", "gate_proj"), tensor.chunk(2), strict=True):
            yield f"{layer}.{part}.weight", weight
    elif leaf != "new_embedding":  # rows that only the tokens of images have
        yield name.replace(".att_proj.", ".qkv_proj.").replace("wte.embedding", "embed_tokens.weight"), tensor


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
        rename, rename_text = map(_find_renaming, (config.whole_family, "Molmo2TextModel"))
        for whole_name, tensor in super().get_all_weights(model_config, model):
            name: str | None = rename(whole_name)
            if config.whole_family not in _AS_LLAMA:
                name = name_in_part(rename(whole_name))
            if name is not None:
                yield from _read_by_vllm(rename_text(name) if config.whole_family == _MOLMO2 else name, tensor, config)

    def track_weights_loading(self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False) -> None:
        super().track_weights_loading(model, loaded_weights, quantized=True)  # which leaves no layer out


@cache
def register_loader() -> None:
    """Let this process's vLLM find the loader, once. vLLM logs it, so processes do it only for such a model."""
    register_model_loader(FORMAT)(LanguageModelLoader)
