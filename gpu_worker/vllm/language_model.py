"""Models that vLLM serves through another class than the one that their config.json names.

vLLM's class of the whole reads other settings or other names than transformers does, but its class of the language
model reads them. So vLLM gets the settings of the language model, and its weights under the names of that class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
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
_MULTIMODAL = {"voxtral"}
_AS_LLAMA = {"exaone"}  # the same but for the names of their tensors
# The language model's name in the whole model. Its head may stand beside it.
_PART = re.compile(r"(?:model\.)?language_model\.|(?=lm_head\.)")


def find_arguments(source: str, model_type: str) -> dict[str, Any]:
    """Return vLLM's arguments for a model that it serves through such a class, none for others.

    Raises: BaseModelUnsupported for quantised weights, which are described by their names in the whole.
    """
    config = read_config(source)
    text_config = config.get_text_config()
    kinds = config_setting(text_config, "layer_types") or ()
    if config.architectures == ["Rnj1ForCausalLM"] and "chunked_attention" not in kinds:
        return {"hf_overrides": {"architectures": ["Gemma3ForCausalLM"]}}  # the same without such layers
    if model_type in _AS_LLAMA:
        name = "LlamaForCausalLM"
    elif model_type in _MULTIMODAL:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]
    else:
        return {}
    if find_quantised(config):
        raise BaseModelUnsupported(f"the vLLM engine does not support {model_type} with quantised weights")
    text_config.update({"architectures": [name]})
    if config_setting(config, "tie_word_embeddings"):  # the whole's counts
        text_config.update({"tie_word_embeddings": True})
    register_loader()
    return {"hf_overrides": partial(_replaced, text_config), "load_format": FORMAT, "language_model_only": False}


def _replaced(config: Any, _: Any) -> Any:
    return config


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
        family = model_config.hf_config.model_type
        mapping = get_checkpoint_conversion_mapping(family) or ()
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        for whole_name, tensor in super().get_all_weights(model_config, model):
            name = whole_name if family in _AS_LLAMA else name_in_part(whole_name)
            if name is not None:
                for renaming in renamings:
                    name, _ = renaming.rename_source_key(name)
                yield name, tensor

    def track_weights_loading(self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False) -> None:
        super().track_weights_loading(model, loaded_weights, quantized=True)  # which leaves no layer out


@cache
def register_loader() -> None:
    """Let this process's vLLM find the loader, once. vLLM logs it, so processes do it only for such a model."""
    register_model_loader(FORMAT)(LanguageModelLoader)
