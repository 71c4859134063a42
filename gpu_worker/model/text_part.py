"""Find the language model in a multimodal checkpoint: its config, and the names of its tensors in the files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from gpu_worker.errors import BaseModelUnsupported

# The multimodal families, and those of their text parts, that compute for text what transformers' text model computes.
# The tests compare them with transformers' whole model. Cohere 2 is not among them: a whole model scales other logits.
MULTIMODAL = frozenset(
    {
        *("gemma3", "idefics3", "internvl", "lighton_ocr", "llava", "llava_next", "llava_onevision"),
        *("mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm"),
    }
)
_TEXT_FAMILIES = frozenset({"gemma3_text", "llama", "ministral3", "mistral", "qwen2", "qwen3"})
# They differ from the text family only in two more dimensions of positions, which equal the first for text.
_SAME_FOR_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_ROPE_OF_IMAGES = ("mrope_section", "mrope_interleaved")
# Checkpoints have the text part under several prefixes, by the release of transformers that wrote them.
TENSOR_PREFIXES: Mapping[str, str] = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^model\.text_model\.": "model.",
}


def text_config(config: Any) -> Any:
    """Return the config of the checkpoint's language model, which of a text-only model is `config` itself.

    Raises: BaseModelUnsupported for a multimodal family whose text part is not known to be one of transformers' models.
    """
    text = getattr(config, "text_config", None)
    is_composite = text is not None or (config.sub_configs and not hasattr(config, "num_hidden_layers"))
    if not is_composite or getattr(config, "is_encoder_decoder", False):
        return config
    family = None if text is None else _SAME_FOR_TEXT.get(text.model_type, text.model_type)
    if config.model_type not in MULTIMODAL or family not in _TEXT_FAMILIES:
        named = "" if text is None else f" ({text.model_type})"
        raise BaseModelUnsupported(
            f"{config.model_type} is a multimodal model whose text part{named} this engine does not serve: use engine"
            " 'vllm' if it does, or save the text part as a model of its own"
        )
    if family == text.model_type:
        found = copy.deepcopy(text)
    else:
        settings = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        rope = settings["rope_parameters"]
        settings["rope_parameters"] = {key: rope[key] for key in rope if key not in _ROPE_OF_IMAGES}
        found = AutoConfig.for_model(family, **settings)
    found.tie_word_embeddings = config.tie_word_embeddings  # the whole model's decides
    for name in ("quantization_config", "eos_token_id"):
        if (value := getattr(config, name, None)) is not None:
            setattr(found, name, value)
    return found
