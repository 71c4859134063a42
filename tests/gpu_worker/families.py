"""Tiny random models of many families: those that the engine supports, and those that it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.tiny import SHAPE, byte_tokenizer

Settings = Mapping[str, object]
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 12}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_ONE_GROUP = {"num_key_value_heads": None}  # the config has no such setting
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **_WINDOW}

# The first ones differ the most from each other, and a small run takes only them.
EQUAL: dict[str, Settings] = {
    "cohere2": _MIXED,
    "gpt_neox": _ONE_GROUP,
    "qwen3_moe": _EXPERTS | _HEADS | {"moe_intermediate_size": 16, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "phi": {"partial_rotary_factor": 0.5},
    "olmo3": _MIXED,
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "glm4": _HEADS,
    "exaone4": _MIXED,
    "gemma": _HEADS,
    "qwen2_moe": _EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOW},
    "phi3": _WINDOW,
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {},
    "cohere2_moe": _EXPERTS | _MIXED | _HEADS,
    "olmo": {},
    "olmo2": {},
    "olmoe": _EXPERTS,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "glm": _HEADS,
    "starcoder2": _WINDOW,
    "smollm3": {},
    "ministral3": _HEADS,
    "helium": _HEADS,
    "apertus": {},
    "arcee": {},
    "seed_oss": _HEADS,
    "jais2": {},
    "laguna": _HEADS | _EXPERTS,
    "bitnet": {},
    "ernie4_5": _HEADS,
    "hyperclovax": {},
    "lfm2": {"layer_types": ["full_attention"] * 3},
    "qwen2": {},
    "minimax_m2": _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "afmoe": _HEADS | _EXPERTS | _MIXED,
    "flex_olmo": _EXPERTS,
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "solar_open": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "persimmon": _ONE_GROUP,
    "gptj": _ONE_GROUP | {"rotary_dim": 4, "tie_word_embeddings": False},
    "opt": _ONE_GROUP | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
}

# These are compared with adapters on their experts too.
WITH_EXPERTS = [
    *("qwen3_moe", "mixtral", "qwen2_moe", "granitemoe", "granitemoeshared", "olmoe", "phimoe", "cohere2_moe"),
    *("minimax_m2", "afmoe", "flex_olmo", "glm4_moe", "solar_open", "ernie4_5_moe", "laguna"),
]

_EYES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
_SIGLIP, _CLIP, _PIXTRAL, _INTERN, _IDEFICS, _SMOL = (
    _EYES | {"model_type": name, "image_size": 8, "patch_size": 4}
    for name in (
        *("siglip_vision_model", "clip_vision_model", "pixtral"),
        *("internvl_vision", "idefics3_vision", "smolvlm_vision"),
    )
)
_QWEN_EYES = {"depth": 1, "num_heads": 2, "patch_size": 4, "intermediate_size": 24, "hidden_size": 16}
_QWEN_EYES |= {"out_hidden_size": 32}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
# Each with its family, and the settings of the text part and of the vision part. They are served as text models.
MULTIMODAL: dict[str, tuple[str, Settings, Settings]] = {
    "gemma3": (
        "gemma3",
        _MIXED | {"model_type": "gemma3_text", "query_pre_attn_scalar": 8, "rope_parameters": _TWO_ROPES},
        _SIGLIP,
    ),
    "qwen3_vl": (
        "qwen3_vl",
        _SECTIONS | {"model_type": "qwen3_vl_text"},
        _QWEN_EYES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "llava": ("llava", {"model_type": "llama"}, _CLIP),
    "qwen2_vl": ("qwen2_vl", _SECTIONS | {"model_type": "qwen2_vl_text"}, _QWEN_EYES | {"hidden_size": 32}),
    "mistral3": ("mistral3", {"model_type": "mistral"}, _PIXTRAL),
    "idefics3": ("idefics3", {"model_type": "llama"}, _IDEFICS),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        _SECTIONS | {"model_type": "qwen2_5_vl_text"},
        _QWEN_EYES | {"fullatt_block_indexes": [0]},
    ),
    "mistral3 (ministral3)": ("mistral3", {"model_type": "ministral3"}, _PIXTRAL),
    "llava (mistral, pixtral)": ("llava", {"model_type": "mistral"}, _PIXTRAL),
    "llava_next": ("llava_next", {"model_type": "mistral", **_WINDOW}, _CLIP),
    "llava_onevision": ("llava_onevision", {"model_type": "qwen2"}, _SIGLIP),
    "internvl": ("internvl", {"model_type": "qwen2"}, _INTERN | {"image_size": [8, 8], "patch_size": [4, 4]}),
    "internvl (qwen3)": ("internvl", {"model_type": "qwen3"}, _INTERN | {"image_size": [8, 8], "patch_size": [4, 4]}),
    "lighton_ocr": ("lighton_ocr", {"model_type": "qwen3"}, _PIXTRAL),
    "smolvlm": ("smolvlm", {"model_type": "llama"}, _SMOL),
}

# Each with the part of the message that gives the reason.
REFUSED: dict[str, tuple[Settings, str]] = {
    "diffllama": ({}, "the model attends more than once in layer 0"),
    "jetmoe": ({}, "the model attends to keys"),
    "nemotron": ({}, "the model does not pass keyword arguments to its attention layers"),
    "granite_swa": ({}, "the model's attention uses s_aux, which this engine does not support"),
    "doge": ({}, "the model passes its own attention mask, which packed rows cannot apply"),
    "mimo_v2_flash": ({}, "the model attends to keys"),
    "codegen": (_ONE_GROUP, "has a config without num_key_value_heads, which this engine does not support"),
    "hunyuan_v1_moe": (
        _HEADS | {"num_experts": 4, "moe_topk": 2},
        "its code uses the weight of a linear layer instead of calling the layer, so no adapter could change it",
    ),
    "gemma2": ({}, "has soft-capping (attn_logit_softcapping)"),
    "vaultgemma": ({}, "has soft-capping (attn_logit_softcapping)"),
    "nanochat": ({}, "has soft-capping (final_logit_softcapping), which this engine does not support"),
    "deepseek_v3": ({}, "has multi-head latent attention, which this engine does not support"),
}
_NO_INTERFACE = "does not support transformers' attention interface, which this engine needs"
# The config alone tells these.
REFUSED_UNLOADED: dict[str, tuple[Settings, str]] = {
    # transformers refuses to give one of two.
    "gemma4_text": ({}, "has no single head_dim for all its layers, which this engine needs"),
    # Falcon looks the attention up in a table of its own, so that building it raises a KeyError.
    "falcon": ({"num_key_value_heads": 2}, _NO_INTERFACE),
    "stablelm": ({}, _NO_INTERFACE),
    "gpt_oss": ({}, "has attention sinks, which this engine does not support"),
    "llama4_text": ({}, "has layers of other kinds (chunked_attention), which this engine does not support"),
}


def save(folder: Path, model_type: str, settings: Settings) -> Path:
    """Save a tiny random model of the family and a byte tokenizer. A setting of None is left out."""
    config = AutoConfig.for_model(model_type, **_present({**SHAPE, **settings}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_multimodal(folder: Path, name: str, **settings: object) -> Path:
    """Save a tiny random model of `MULTIMODAL` with its vision part, and a byte tokenizer. `settings`: of the text."""
    model_type, text, vision = MULTIMODAL[name]
    places = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {place: 290 + number for number, place in enumerate((*places, "boi_token_index", "eoi_token_index"))}
    config = AutoConfig.for_model(
        model_type, text_config=_present({**SHAPE, **_HEADS, **text, **settings}), vision_config=dict(vision), **tokens
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def whole_model(folder: Path) -> Any:
    """Load transformers' model of the checkpoint in float32, with its vision part if it has one."""
    is_multimodal = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    model_class = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def eager_answer(model: Any, tokens: Sequence[int], num_new: int) -> tuple[torch.Tensor, list[int]]:
    """Return the logits of the first new token, and the greedy tokens, without a cache."""
    found, first = list(tokens), torch.empty(0)
    with torch.inference_mode():
        for number in range(num_new):
            logits = model(input_ids=torch.tensor([found]), use_cache=False).logits[0, -1]
            first = first if number else logits
            found.append(int(logits.argmax()))
    return first, found[-num_new:]


def train(folder: Path, target: Path, seed: int, **settings: Any) -> Path:
    """Save an adapter of the whole model, with random weights, as PEFT does."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    model = get_peft_model(whole_model(folder), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(target)
    return target


def _present(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
