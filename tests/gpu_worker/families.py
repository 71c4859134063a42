"""Tiny random models of many families: those that the engine supports, and those that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import SHAPE, byte_tokenizer

Settings = Mapping[str, object]
_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 12}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **_WINDOW}

# The first ones differ the most from each other, and a small run takes only them.
EQUAL: dict[str, Settings] = {
    "cohere2": _MIXED,
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
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
}

# Each with the part of the message that gives the reason.
REFUSED: dict[str, tuple[Settings, str]] = {
    "diffllama": ({}, "more than once in layer 0"),
    "jetmoe": ({}, "keys"),
    "nemotron": ({}, "keyword arguments"),
    "granite_swa": ({}, "s_aux"),
    "doge": ({}, "its own attention mask"),
    "gemma4_text": ({}, "no single head_dim"),
    "mimo_v2_flash": ({}, "keys"),
    "gpt_neox": ({}, "keys"),
    "persimmon": ({}, "keys"),
    "stablelm": ({}, "attention interface"),
    "falcon": ({}, "attention interface"),
    "hunyuan_v1_moe": (_HEADS | {"num_experts": 4, "moe_topk": 2}, "uses the weight of a linear layer"),
    "gemma2": ({}, "soft-capping"),
    "vaultgemma": ({}, "soft-capping"),
    "nanochat": ({}, "soft-capping"),
    "deepseek_v3": ({}, "latent attention"),
    "gpt_oss": ({}, "attention sinks"),
    "llama4_text": ({}, "chunked_attention"),
}


def save(folder: Path, model_type: str, settings: Settings) -> Path:
    """Save a tiny random model of the family and a byte tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
