"""Tiny random models of the families that vLLM serves, and those that the engine refuses."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.mistral import convert_tekken_tokenizer

from gpu_worker.model.checkpoint import auto_class
from gpu_worker.model.own_families import OWN_FAMILIES
from gpu_worker.vllm.front_model import language_part
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.conformance.driver import HostedEngine, job, tokens_of
from tests.gpu_worker.conformance.reference import Reference
from tests.tiny import SHAPE, byte_tokenizer, change_json, merged, plan_of, random_adapter

Settings = Mapping[str, Any]
# Heads have 32 values, the least that vLLM takes on the CPU.
_TEXT: dict[str, Any] = {**SHAPE, "hidden_size": 128, "intermediate_size": 96}
_HEADS = {"head_dim": 32}
_WINDOW = {"sliding_window": 24}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **_WINDOW}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_GROUPS = {"n_group": 1, "topk_group": 1}
_LATENT = {
    "kv_lora_rank": 512,  # with the 64 of positions the only size that vLLM takes on the CPU
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_DELTA = {
    "linear_key_head_dim": 128,  # the only size that vLLM takes on the CPU
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
_YARN |= {"original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}}
_HALF_SECTIONS = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2}

TEXT: dict[str, Settings] = {
    # mixtures of experts
    "qwen3_moe": {**_EXPERTS, **_HEADS, "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "mixtral": _LOCAL_EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "olmoe": _EXPERTS,
    "granitemoe": _LOCAL_EXPERTS,
    "granitemoeshared": {**_LOCAL_EXPERTS, "shared_intermediate_size": 64},
    "deepseek_v2": {**_ROUTED, **_LATENT, **_GROUPS, "n_shared_experts": 1},
    "deepseek_v3": {**_ROUTED, **_LATENT, **_GROUPS, "n_shared_experts": 1, "topk_method": "noaux_tc",
                    "scoring_func": "sigmoid"},
    "glm4_moe": {**_ROUTED, **_HEADS, **_GROUPS, "n_shared_experts": 1},
    "glm4_moe_lite": {**_ROUTED, **_LATENT, **_GROUPS, "n_shared_experts": 1},
    "gpt_oss": {**_LOCAL_EXPERTS, **_HEADS, **_MIXED, "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_hidden_layers": 4},
    "phimoe": {**_LOCAL_EXPERTS, "attention_bias": True, "lm_head_bias": True},
    "minimax_m2": {**_LOCAL_EXPERTS, **_HEADS, "rotary_dim": 32, "scoring_func": "sigmoid",
                   "use_routing_bias": True},
    "afmoe": {**_EXPERTS, **_HEADS, **_MIXED, "num_dense_layers": 1, "num_shared_experts": 1,
              "score_func": "sigmoid", "route_norm": True, **_GROUPS},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "exaone_moe": {**_EXPERTS, **_HEADS, **_MIXED, "num_shared_experts": 1, "first_k_dense_replace": 1,
                   "is_moe_layer": [False, True, True], **_GROUPS},
    "laguna": {**_EXPERTS, **_HEADS, "shared_expert_intermediate_size": 32},
    "hy_v3": {**_EXPERTS, **_HEADS, "expert_hidden_dim": 32, "route_norm": True, "num_shared_experts": 1,
              "first_k_dense_replace": 1, "qk_norm": True},
    "longcat_flash": {**_LATENT, "n_routed_experts": 4, "moe_topk": 2, "expert_ffn_hidden_size": 32,
                      "ffn_hidden_size": 96, "zero_expert_num": 0, "num_layers": 2,
                      "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "axk1": {**_ROUTED, **_LATENT, **_GROUPS, "n_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, **_HEADS},
    "dots1": {**_ROUTED, **_HEADS, **_GROUPS, "n_shared_experts": 1},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 32},
    "sarvam_moe": {**_ROUTED, **_HEADS, **_GROUPS, "n_shared_experts": 1, "embedding_dropout": 0.0, "use_bias": False,
                   "moe_shared_expert_intermediate_size": 32, "moe_router_enable_expert_bias": True,
                   "score_function": "sigmoid", "use_rmsnorm": True},
    "sarvam_mla": {**_ROUTED, **_LATENT, **_GROUPS, "n_shared_experts": 1},
    "solar_open": {**_ROUTED, **_HEADS, **_GROUPS, "n_shared_experts": 1},
    "llama4_text": {**_LOCAL_EXPERTS, **_HEADS, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1,
                    "num_experts_per_tok": 1, "attention_chunk_size": 128},
    "gemma4_text": {**_HEADS, **_MIXED, "global_head_dim": 32, "hidden_size_per_layer_input": 16,
                    "vocab_size_per_layer_input": 300, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0},
    # linear attention and state-space layers
    "qwen3_next": {**_EXPERTS, **_HEADS, **_DELTA, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**_HEADS, **_DELTA},
    "qwen3_5_moe_text": {**_EXPERTS, **_HEADS, **_DELTA, "shared_expert_intermediate_size": 32},
    "olmo_hybrid": {**_DELTA},
    "granitemoehybrid": {**_LOCAL_EXPERTS, **_MAMBA2, "shared_intermediate_size": 64,
                         "layer_types": ["mamba", "attention", "mamba"]},
    "falcon_h1": {**_HEADS, **_MAMBA2, "mamba_d_ssm": 256},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 8,
              "use_mamba_kernels": False},
    "nemotron_h": {**_HEADS, "mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 16,
                   "layers_block_type": ["mamba", "attention", "mlp"], "n_routed_experts": 4,
                   "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
                   "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 96, "block_auto_adjust_ff_dim": False,
             "conv_dim": 128, "conv_dim_out": 128, "block_dim": 128},
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    # dense
    "apertus": {}, "cohere": {}, "exaone4": {**_MIXED, **_HEADS}, "gemma": _HEADS, "gemma2": {**_HEADS, **_MIXED},
    "gemma3_text": {**_HEADS, **_MIXED}, "glm4": _HEADS, "glm": _HEADS, "granite": {}, "granite_swa": {},
    "hyperclovax": {}, "llama": {}, "mistral": {}, "nemotron": {}, "opt": {"ffn_dim": 96, "word_embed_proj_dim": 128},
    "qwen2": {}, "qwen3": _HEADS, "phi": {}, "phi3": {}, "olmo2": {}, "smollm3": {}, "starcoder2": {},
    "exaone": {}, "internlm3": {}, "iquestcoder": {}, "cohere2": _MIXED, "ministral3": _HEADS, "seed_oss": _HEADS,
    "gpt_neox": {"num_key_value_heads": 4}, "granitemoe_swa": _LOCAL_EXPERTS,
    "ernie4_5": _HEADS, "arcee": {}, "jais2": {}, "olmo": {}, "olmo3": _MIXED, "hunyuan_v1_dense": _HEADS,
    "cwm": {**_HEADS, **_MIXED}, "vaultgemma": {**_HEADS, **_MIXED}, "ministral": {**_HEADS, **_WINDOW},
    "mellum": {**_EXPERTS, **_HEADS, **_MIXED, "mlp_layer_types": ["sparse"] * 3, "num_mtp_layers": 0},
    "minicpm3": {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
                 "v_head_dim": 32, "num_key_value_heads": 4, "dim_model_base": 64},
    "gpt_bigcode": {"n_positions": 256, "multi_query": True, "n_inner": 96, "num_key_value_heads": 1},
}  # fmt: skip
_CHATGLM = {"num_layers": 3, "padded_vocab_size": 300, "ffn_hidden_size": 96, "kv_channels": 32, "seq_length": 256}
_CHATGLM |= {"layernorm_epsilon": 1e-5, "add_qkv_bias": True, "multi_query_group_num": 2, "original_rope": True}
_CHATGLM |= {"multi_query_attention": True, "rope_ratio": 500, "rmsnorm": True, "post_layer_norm": True}
# Their checkpoints on the model hub bring code, which is never run.
_OWN_CODE = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}}
TEXT |= {
    "mimo": {**_OWN_CODE, "attention_bias": True},
    "minicpm": {**_OWN_CODE, "scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 64},
    "PanguEmbedded": {**_OWN_CODE, "bias": True},
    "internlm2": {**_OWN_CODE, "bias": False},
    "chatglm": {**_OWN_CODE, **_CHATGLM},
    "telechat": {**_OWN_CODE, "num_key_value_heads": 4, "n_layer": 3, "n_head": 4, "ffn_hidden_size": 96},
    "solar": {**_OWN_CODE, "bskcn_1": [1], "bskcn_2": [1], "bskcn_3": [2], "bskcn_4": [2], "bskcn_tv": [0.9, 0.8]},
    "bailing_moe": {
        **TEXT["sarvam_moe"],
        **_OWN_CODE,
        "partial_rotary_factor": 0.5,
        "rotary_dim": 16,
        "use_qk_norm": True,
    },
    "param2moe": {
        **{name: value for name, value in TEXT["sarvam_moe"].items() if name not in ("score_function", "use_rmsnorm")},
        **_OWN_CODE,
        **{"n_shared_experts": 2, "moe_shared_expert_intermediate_size": 64, "rope_theta": 600_000.0},
    },
    "TeleFLM": {**_OWN_CODE, "use_mup": True, "input_mult": 1.0, "output_mult": 2.0, "mup_scale_factor": 4},
}
_GROUP_OF_2 = {"n_heads_in_group": 2, "no_op": False}
_NO_ATTENTION: dict[str, Any] = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
_NO_MLP = {"ffn_mult": None, "no_op": True}
_BLOCKS: list[dict[str, Any]] = [
    {"attention": _GROUP_OF_2, "ffn": {"ffn_mult": 1.0, "no_op": False}},
    {"attention": _NO_ATTENTION, "ffn": {"intermediate_size": 96, "no_op": False}},
    {"attention": _GROUP_OF_2, "ffn": _NO_MLP},
]
TEXT["nemotron-nas"] = {**_OWN_CODE, "block_configs": _BLOCKS, "intermediate_size": None, "num_key_value_heads": None}
TEXT["plamo3"] = {**_OWN_CODE, **_HEADS, "window_size": 24, "sliding_window_pattern": 2, "rope_theta": 1_000_000}
TEXT["k2_horizon"] = {**_OWN_CODE, **_HEADS, "num_experts": 0, "layernorm_num_groups": 4, "query_key_norm": False}
_GATED = {"query_key_norm": True, "attention_gate_func": "softplus"}
TEXT["k2_horizon (with gates)"] = {**TEXT["k2_horizon"], **_GATED}
# Variants of a family. The text in parentheses says what is other than in the family.
TEXT |= {
    "apertus (in bfloat16)": {},
    "deepseek_v3 (with YaRN)": {**TEXT["deepseek_v3"], "rope_parameters": _YARN},
    # vLLM has no least time step, and transformers takes the published 0.001.
    "nemotron_h (without a least time step)": {**TEXT["nemotron_h"], "time_step_min": 1e-9},
    "nemotron_h (with experts)": {
        **TEXT["nemotron_h"],
        "time_step_min": 1e-9,
        "layers_block_type": ["mamba", "attention", "moe"],
    },
    "mistral (as Pixtral in Mistral's format)": {**_HEADS, "sliding_window": None},
    "gemma3_text (as Rnj-1)": {**_HEADS, "layer_types": ["full_attention"] * 3},
    "gemma4_text (with experts)": {
        **TEXT["gemma4_text"],
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
}

_OMNI_EYES = {"image_size": 8, "apply_vit_abs_pos_embed": True}
_GEMMA4_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_GEMMA4_VISION |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16}
# The settings of the language model, and of the whole.
MULTIMODAL: dict[str, tuple[Settings, Settings]] = {
    "gemma3": ({**_HEADS, **_MIXED}, {"mm_tokens_per_image": 4}),
    "qwen2_5_vl": (_SECTIONS, {}),
    "qwen3_vl": ({**_HEADS, **_SECTIONS}, {}),
    "qwen3_5": ({**_HEADS, **_DELTA}, {}),
    "mistral3": (_HEADS, {}),
    "llama4": (TEXT["llama4_text"], {}),
    "qwen2_vl": (_SECTIONS, {}),
    "cosmos3_omni": ({**_HEADS, **_SECTIONS}, {}),
    "qwen3_vl_moe": ({**_HEADS, **_SECTIONS, **_EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True}, {}),
    "qwen3_5_moe": (TEXT["qwen3_5_moe_text"], {}),
    "gemma4": (TEXT["gemma4_text"], {"vision_config": {"model_type": "gemma4_vision", **_GEMMA4_VISION}}),
    "llava": ({}, {}),
    "llava_next": ({}, {}),
    "llava_next_video": ({}, {}),
    "internvl": ({}, {}),
    "idefics3": ({}, {}),
    "paligemma": (_HEADS, {}),
    "glm4v": (_HALF_SECTIONS, {}),
    "glm4v_moe": ({**_HALF_SECTIONS, **TEXT["glm4_moe"], "use_qk_norm": False}, {}),
    "ernie4_5_vl_moe": (
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [32, 32],
            "moe_num_shared_experts": 1,
            "rope_parameters": {**_ROPE, "mrope_section": [6, 6, 4]},
        },
        {},
    ),
    "lfm2_vl": (TEXT["lfm2"], {}),
    "granite_speech": ({}, {}),
    "qwen2_5_omni": ({**_SECTIONS, "tie_word_embeddings": False}, {}),
    "qwen3_asr": ({}, {}),
    "voxtral": ({}, {}),
    "glmasr": ({}, {}),
    "blip-2": ({"ffn_dim": 96, "word_embed_proj_dim": 128}, {}),
    "cohere_compass": (
        {**_MIXED, "rope_parameters": dict.fromkeys(_MIXED["layer_types"], _ROPE), "tie_word_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "minicpmv4_6": ({**_HEADS, **_DELTA}, {}),
    "muse_glimmer": (_HEADS, {"vision_config": {"output_dim": 128}}),
    "nemotron_h_omni": (TEXT["nemotron_h (without a least time step)"], {}),
    "molmo2": (
        {**_HEADS, "additional_vocab_size": 8},
        {"vision_config": {"image_size": [8, 8]}, "adapter_config": {"vision_feature_layer": [0]}},
    ),
    "audioflamingo3": ({}, {}),
    "exaone4_5": (TEXT["exaone4"], {}),
    "gemma4_unified": (
        {**_HEADS, **_MIXED, "global_head_dim": 32, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0},
        {
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": 4,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
            }
        },
    ),
    "glm_ocr": (
        {**_HEADS, "rope_parameters": {**_SECTIONS["rope_parameters"], "partial_rotary_factor": 1.0}},
        {},
    ),
    "granite4_vision": (
        {},
        {
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
            "downsample_rate": "1/2",
            "vision_config": {"hidden_size": 64},
        },
    ),
    "granite_speech_plus": ({}, {}),
    "lighton_ocr": (
        _HEADS,
        {"projector_hidden_act": "gelu", "multimodal_projector_bias": False, "vision_feature_layer": -1},
    ),
    "minicpmv4_7": ({**_HEADS, **_DELTA}, {}),
    "qwen3_omni_moe": (
        {
            **{**_HEADS, **_SECTIONS, **_EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True},
            "tie_word_embeddings": False,
        },
        {"enable_audio_output": False, "thinker_config": {"vision_config": _OMNI_EYES}},
    ),
    "smolvlm": ({}, {}),
}

_EYES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_EYES |= {"patch_size": 4, "image_size": 8, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True}
_EYES |= {"num_channels": 3, "initializer_factor": 0.1, "norm_type": "layer_norm", "qk_normalization": False}
_CHAT = {
    "vision_config": _EYES,
    "force_image_size": 8,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    **_OWN_CODE,
}
_DOTS_EYES = {**_EYES, "embed_dim": 32, "spatial_merge_size": 2, "temporal_patch_size": 1, "rms_norm_eps": 1e-5}
_DOTS_EYES |= {"use_bias": False, "post_norm": True}
_EARS: dict[str, Any] = {
    "attention_dim": 32,
    "attention_heads": 2,
    "num_blocks": 1,
    "linear_units": 32,
    "input_size": 80,
}
_EARS |= {"chunk_size": -1, "left_chunk": 18, "time_reduction": 8, "nemo_conv_settings": {"conv_channels": 32}}
_EARS |= {"relative_attention_bias_args": {"type": "t5"}, "encoder_embedding_config": {"input_size": 80}}
_PHI4_ENCODERS = {
    "img_processor": None,
    "audio_processor": {"name": "cascades", "config": _EARS},
    "embd_layer": {
        "embedding_cls": "image_audio",
        "audio_embd_layer": {"embedding_cls": "audio", "projection_cls": "mlp", "downsample_rate": 1},
    },
}
# The settings of their language models stand beside those of the encoders.
_KEYE = {**_TEXT, **_HEADS, **_SECTIONS, "vision_config": {**_EYES, "spatial_merge_size": 2}, **_OWN_CODE}
MULTIMODAL |= {name: ({}, _KEYE) for name in ("Keye", "KeyeVL1_5")}
MULTIMODAL["dots_ocr"] = ({}, {**_TEXT, "vision_config": _DOTS_EYES, **_OWN_CODE})
MULTIMODAL["phi4mm"] = ({}, {**_TEXT, **_PHI4_ENCODERS, **_OWN_CODE})
MULTIMODAL |= {name: ({}, _CHAT) for name in ("internvl_chat", "h2ovl_chat", "eagle_2_5_vl", "NVLM_D")}
_PANGU_ROPE = {"rope_scaling": {"type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True}}
MULTIMODAL["openpangu_vl"] = ({}, {**_TEXT, **_PANGU_ROPE, "bias": True, "rope_theta": 64_000_000.0, **_OWN_CODE})
MULTIMODAL["moss_audio"] = ({**_HEADS, "model_type": "qwen3"}, {"audio_config": {"d_model": 32}, **_OWN_CODE})
MULTIMODAL["opencua"] = ({}, {**_OWN_CODE, "vision_config": {"out_hidden_size": 128}})
_RADIO = {"vit_hidden_size": 32, "projector_hidden_size": 32, "vision_config": {"image_size": 8, "patch_size": 4}}
MULTIMODAL["Llama_Nemotron_Nano_VL"] = ({}, {**_CHAT, **_RADIO})
_NORMS = {"qk_norm": True, "num_key_value_heads": 2}
MULTIMODAL["bagel"] = ({**_NORMS, "model_type": "qwen2"}, {"vit_config": _EYES, "visual_und": True, **_OWN_CODE})
MULTIMODAL["ultravox"] = ({}, {"vocab_size": _TEXT["vocab_size"], "hidden_size": 32, **_OWN_CODE})
MULTIMODAL["isaac"] = ({}, {**_TEXT, **_HEADS, **_OWN_CODE})
_MINICPMV = {**_TEXT, **_HEADS, "vision_config": _EYES, **_OWN_CODE}
MULTIMODAL |= {f"minicpmv (version {version})": ({}, {**_MINICPMV, "version": version}) for version in (2.5, 2.6, 4.5)}
_WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
MULTIMODAL["minicpmo"] = ({}, {**_MINICPMV, "version": "2.6", "audio_config": _WHISPER})
_WITHOUT_LATENTS = {**_ROUTED, **_GROUPS, "n_shared_experts": 1, "num_key_value_heads": 4, "topk_method": "greedy"}
_WITHOUT_LATENTS |= {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0, "kv_lora_rank": None}
_WITHOUT_LATENTS |= {"architectures": ["DeepseekV2ForCausalLM"], "use_mla": False, "q_lora_rank": None}
_DEEPSEEK_EYES = {"tile_tag": "2D", "projector_config": {"n_embed": 32}, "vision_config": {"image_size": 8}}
_DEEPSEEK = (_WITHOUT_LATENTS, {**_DEEPSEEK_EYES, **_OWN_CODE})
MULTIMODAL |= {f"deepseek_vl_v2 ({name})": _DEEPSEEK for name in ("OCR", "OCR 2")}
_MOLMO = {**_TEXT, **_OWN_CODE, "intermediate_size": 192, "embedding_size": 304, "qkv_bias": True}
MULTIMODAL["molmo"] = ({}, _MOLMO)
_OLMO = {"qkv_bias": False, "norm_after": True, "attention_layer_norm": True}
MULTIMODAL["molmo (with OLMo)"] = ({}, {**_MOLMO, **_OLMO})
_EVA = {**_EYES, "num_heads": 2, "num_positions": 5, "in_channels": 3, "dropout_prob": 0.0, "scaling_factor": 8.0}
_GLM4V = {"vision_config": _EVA, "architectures": ["GLM4VForCausalLM"]}
TEXT["chatglm (with images)"] = {**TEXT["chatglm"], **_GLM4V}
MULTIMODAL["intern_s2_preview"] = (TEXT["qwen3_5_moe_text"], _OWN_CODE)
MULTIMODAL["qwen3_asr (realtime)"] = MULTIMODAL["qwen3_asr"]
MULTIMODAL["interns2_mobius"] = ({**TEXT["qwen3_5_moe_text"], "num_blocks": 2}, _OWN_CODE)
MULTIMODAL["qianfan_ocr"] = (_HEADS, {"vision_config": {"image_size": 8, "patch_size": 4}, "force_image_size": 8})

# What checkpoints on the model hub name otherwise than transformers' class of the family.
ARCHITECTURES = {
    "chatglm": "ChatGLMModel",
    "chatglm (with images)": "GLM4VForCausalLM",
    "intern_s2_preview": "InternS2PreviewForConditionalGeneration",
    "interns2_mobius": "InternS2MobiusForConditionalGeneration",
    "bailing_moe": "BailingMoeV2ForCausalLM",
    "cosmos3_omni": "Cosmos3ForConditionalGeneration",
    "moss_audio": "MossAudioModel",
    "param2moe": "Param2MoEForCausalLM",
    "openpangu_vl": "OpenPanguVLForConditionalGeneration",
    "qwen3_asr (realtime)": "Qwen3ASRRealtimeGeneration",
    "opencua": "OpenCUAForConditionalGeneration",
    "Llama_Nemotron_Nano_VL": "Llama_Nemotron_Nano_VL",
    "bagel": "BagelForConditionalGeneration",
    "ultravox": "UltravoxModel",
    "isaac": "IsaacForConditionalGeneration",
    "minicpmv": "MiniCPMV",
    "minicpmo": "MiniCPMO",
    "deepseek_vl_v2 (OCR)": "DeepseekOCRForCausalLM",
    "deepseek_vl_v2 (OCR 2)": "DeepseekOCR2ForCausalLM",
    "PanguEmbedded": "PanguEmbeddedForCausalLM",
    "mimo": "MiMoForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "internvl_chat": "InternVLChatModel",
    "h2ovl_chat": "H2OVLChatModel",
    "Keye": "KeyeForConditionalGeneration",
    "KeyeVL1_5": "KeyeVL1_5ForConditionalGeneration",
    "dots_ocr": "DotsOCRForCausalLM",
    "phi4mm": "Phi4MMForCausalLM",
    "TeleFLM": "TeleFLMForCausalLM",
    "NVLM_D": "NVLM_D",
    "molmo": "MolmoForCausalLM",
    "k2_horizon": "K2HorizonForCausalLM",
    "nemotron-nas": "DeciLMForCausalLM",
    "plamo3": "Plamo3ForCausalLM",
    "exaone": "ExaoneForCausalLM",
    "gemma3_text (as Rnj-1)": "Rnj1ForCausalLM",
    "mistral (as Pixtral in Mistral's format)": "PixtralForConditionalGeneration",
    "eagle_2_5_vl": "Eagle2_5_VLForConditionalGeneration",
    "lighton_ocr": "LightOnOCRForConditionalGeneration",
    "phimoe": "PhiMoEForCausalLM",
    "sarvam_mla": "SarvamMLAForCausalLM",
    "sarvam_moe": "SarvamMoEForCausalLM",
}
TEXT_NAMES = {"bagel": "llm_config", "Llama_Nemotron_Nano_VL": "llm_config", "deepseek_vl_v2": "language_config"}
TEXT_NAMES["moss_audio"] = "language_config"
# Their checkpoints on the model hub have experts with inputs first, which transformers writes otherwise for tiny ones.
INPUTS_FIRST = ("qwen3_vl_moe",)
# vLLM computes linear attention on the CPU in bfloat16 only, and a part of Apertus in bfloat16 always.
IN_BFLOAT16 = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7"),
    *("intern_s2_preview", "interns2_mobius"),
    "apertus (in bfloat16)",
)
# vLLM makes the processor of these at its start, also without images and sounds.
_OMNI = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 8,
}
PROCESSORS = {
    "qwen2_5_omni": {**_OMNI, "processor_class": "Qwen2_5OmniProcessor"},
    "qwen3_omni_moe": {**_OMNI, "processor_class": "Qwen3OmniMoeProcessor"},
}
_OMNI_TOKENS = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")

_MISTRAL_NAMES = {
    "tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
_MISTRAL_SETTINGS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps", "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip

NUM_SPECIAL = 4  # tokens of the tekken.json that the tests write
MISTRAL = "mistral"  # name of the folder with Mistral's own format, beside the files of transformers

FAMILIES = [*TEXT, *MULTIMODAL]
assert {*OWN_FAMILIES} <= {family.partition(" ")[0] for family in FAMILIES}, "each of them is compared"
PROMPTS = ("The parrot says " * 4, "x")
NUM_NEW = 8
TOLERANCE = 1e-3  # of a log probability

# Sizes of the parts for images and sound, as far as their configs have them.
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_heads": 2, "patch_size": 4, "image_size": 8, "out_hidden_size": 128, "embed_dim": 32, "num_layers": 1,
    "encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "d_model": 32, "num_key_value_heads": 2,
    "projection_dim": 128, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
    "num_position_embeddings": 16, "video_temporal_patch_size": 2, "max_source_positions": 16, "num_mel_bins": 8,
    "decoder_dim": 32, "codebook_size": 16, "encoder_hidden_size": 32, "hidden_dim": 32, "head_dim": 16,
    "dim_head": 16, "output_dim": 32, "vision_output_dim": 128, "projector_input_dim": 128,
    "projector_output_dim": 128,
}  # fmt: skip


def config_of(family: str) -> PretrainedConfig:
    """Return the configuration of a tiny model of the family."""
    if family in TEXT:
        return AutoConfig.for_model(family.partition(" ")[0], **{**_TEXT, **TEXT[family]})
    text, whole = MULTIMODAL[family]
    name = family.partition(" ")[0]
    default = AutoConfig.for_model(name)
    return AutoConfig.for_model(name, **merged(_tiny(default, default.get_text_config(), text), whole))


def _tiny(config: PretrainedConfig, language: PretrainedConfig, text: Settings) -> dict[str, Any]:
    """Return the settings of a small model, with `text` for the config `language` within it."""
    if config is language:
        return {"model_type": config.model_type, **_TEXT, **text}
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    parts = {name: _tiny(part, language, text) for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    sizes = {name: size for name, size in _TOWER.items() if hasattr(config, name)}
    return parts or {"model_type": config.model_type, **sizes}


def save(folder: Path, family: str, model: PreTrainedModel | None = None) -> Path:
    """Save a tiny random model of the family, or this model, and a byte tokenizer."""
    torch.manual_seed(0)
    model = model or auto_class(config := config_of(family)).from_config(config)
    with torch.no_grad():
        head = language_part(model).get_output_embeddings().weight
        head[: NUM_SPECIAL if "Mistral's format" in family else 0] = head[256:] = 0  # no special token is ever chosen
        for name, bias in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("correction_bias", "expert_bias")):  # zeros at first, which would choose as none
                bias.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    name = family.partition(" ")[0]
    if (architecture := ARCHITECTURES.get(family, ARCHITECTURES.get(name))) is not None:
        change_json(folder / "config.json", {"architectures": [architecture]})
    if name == "chatglm":  # transformers writes its own names of these
        change_json(folder / "config.json", _CHATGLM)
    if name in TEXT_NAMES:  # the hub's files have the settings of the language model under this name
        written = json.loads((folder / "config.json").read_text())
        del written["text_config"]
        text = {**_TEXT, **MULTIMODAL[family][0]}
        (folder / "config.json").write_text(json.dumps(written | {TEXT_NAMES[name]: text}))
    if name == "deepseek_vl_v2":  # vLLM asks for this token, and for these of the tensors for images
        change_json(folder / "tokenizer_config.json", {"extra_special_tokens": {"image_token": "<image>"}})
        marks = ("view_seperator",) if family.endswith("2)") else ("view_seperator", "image_newline")
        tensors = load_file(folder / "model.safetensors") | {f"model.{mark}": torch.ones(32) for mark in marks}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if name == "molmo":  # the hub's files have two embeddings
        tensors = load_file(folder / "model.safetensors")
        rows = model.get_output_embeddings().weight.shape[0]
        whole = model.get_input_embeddings().weight
        tensors = {name: each for name, each in tensors.items() if ".wte." not in name}
        tensors["model.transformer.wte.embedding"] = whole[:rows].detach().clone()
        tensors["model.transformer.wte.new_embedding"] = whole[rows:].detach().clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if family in PROCESSORS:
        change_json(folder / "preprocessor_config.json", PROCESSORS[family])
        change_json(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor"})
        tokens = {f"{name}_token": tokenizer.pad_token for name in _OMNI_TOKENS}
        change_json(folder / "tokenizer_config.json", {"extra_special_tokens": tokens})
        torch.save({}, folder / "spk_dict.pt")  # voices, which Qwen2.5-Omni reads with its weights
    if family == "phi4mm":  # the hub's files have names of PEFT, and its authors' adapters
        tensors = {name.replace("_proj.", "_proj.base_layer."): each for name, each in model.state_dict().items()}
        tensors["model.layers.0.mlp.down_proj.lora_A.vision.weight"] = torch.ones(4, 96)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if family == "axk1":  # the hub's files have this norm in dense layers too, which do not use it
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.post_mlp_layernorm.weight"] = torch.ones(128)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if family == "molmo2":  # the hub's files have the added tokens in the other tensor
        tensors, name = load_file(folder / "model.safetensors"), "model.transformer.wte"
        rows = torch.cat([tensors[f"{name}.embedding"], tensors[f"{name}.new_embedding"]])
        tensors |= {f"{name}.embedding": rows[:-8].clone(), f"{name}.new_embedding": rows[-8:].clone()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if family == "qianfan_ocr":  # the hub's files have these names and numbers, which transformers does not write back
        tensors = load_file(folder / "model.safetensors")
        tensors = {name.replace("model.encoder.layers", "model.layers"): each for name, each in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        change_json(folder / "config.json", {"vision_config": {"image_size": 8, "patch_size": 4}})
    if "Mistral's format" in family:
        write_mistral(model, folder / MISTRAL)
        read_tekken(folder / MISTRAL / "tekken.json").save_pretrained(folder)
    if family in INPUTS_FIRST:
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: each.mT.contiguous() for name, each in tensors.items() if ".experts." in name}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_tekken(file: Path) -> Any:
    """Return transformers' tokenizer of the file, with the mark of the start that Mistral's own tools write."""
    tokenizer = convert_tekken_tokenizer(str(file))
    start = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return tokenizer


def write_mistral(model: PreTrainedModel, folder: Path) -> None:
    """Write a model of Mistral, and a vision tower, in the format of Mistral's own tools."""
    folder.mkdir()
    config, tensors = model.config, {"vision_encoder.ln_pre.weight": torch.ones(8)}
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # the halves of a head side by side
            tensor = tensor.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        for theirs, ours in _MISTRAL_NAMES.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        tensors[name.removeprefix("model.")] = tensor.contiguous()
    save_file(tensors, folder / "consolidated.safetensors")
    params = {key: getattr(config, name) for key, name in _MISTRAL_SETTINGS.items()}
    params |= {"rope_theta": config.rope_parameters["rope_theta"], "vision_encoder": {"hidden_size": 8}}
    (folder / "params.json").write_text(json.dumps(params))
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    assert len(special) == NUM_SPECIAL
    settings = {"pattern": r"\S+|\s+", "default_vocab_size": 260, "default_num_special_tokens": NUM_SPECIAL}
    tekken = {
        "config": settings,
        "vocab": [{"rank": each, "token_bytes": b64encode(bytes([each])).decode()} for each in range(256)],
        "special_tokens": [{"rank": rank, "token_str": text} for rank, text in enumerate(special)],
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))


def assert_equal(hosted: HostedEngine, folder: Path) -> float:
    """Check that one batch of all kinds of plans answers as the float64 reference. Return the furthest difference.

    The engine's adapters are of all modules that it takes.
    """
    reference = Reference(folder)
    one = random_adapter(hosted.engine.module_shapes, 1, size=0.05)
    other = random_adapter(hosted.engine.module_shapes, 2, rank=3, size=0.05)
    hosted.add(one, other)
    parts = (one, 0.5), (other, 0.7)
    plans = [
        BASE_PLAN,
        plan_of("selection", (one, 1.0)),
        plan_of("selection", (other, -0.7)),
        plan_of("mixture", *parts),
        plan_of("fusion", *parts),
    ]
    asked = [(prompt, plan) for prompt in PROMPTS for plan in plans]
    furthest = 0.0
    for (prompt, plan), answer in zip(asked, hosted.answers(*[job(*each) for each in asked]), strict=True):
        name = f"{plan.strategy}, prompt of {len(prompt)} characters"
        steps = reference.greedy(prompt, plan, hosted.pool, NUM_NEW)
        for entry, step in zip(answer.logprobs, steps, strict=True):
            known = step.logprobs.topk(len(entry.top)).values
            found = torch.tensor([logprob for _, logprob in entry.top], dtype=torch.float64)
            furthest = max(furthest, float((found - known).abs().max()))
            assert furthest <= TOLERANCE, f"{name}: a log probability differs by {furthest:.2g}"
        assert tokens_of(answer) == [reference.token_bytes(step.token) for step in steps], name
    return furthest
