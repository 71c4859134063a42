"""Families whose checkpoints bring code are read by classes of transformers, and that code is never run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Phi3Config, PreTrainedConfig

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.authors_names import Param2MoEConfig, SolarConfig, TeleChat2Config
from gpu_worker.model.base_model import load_config
from gpu_worker.model.checkpoint import auto_class, check_checkpoint
from gpu_worker.model.own_families import (
    OWN_FAMILIES,
    BagelConfig,
    MiniCPMConfig,
    PanguEmbeddedConfig,
    TeleFLMConfig,
)
from gpu_worker.vllm.front_model import load_front_model
from tests.gpu_worker.conformance.families import FAMILIES, IN_BFLOAT16, MULTIMODAL, save
from tests.tiny import tiny_config

OWN = [family for family in FAMILIES if family.partition(" ")[0] in OWN_FAMILIES]
_USUAL = {"model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"}
_SHARED = {"model.layers.0.self_attn.o_proj", "model.layers.2.mlp.shared_experts.down_proj"}
_CHATGLM = {f"transformer.encoder.layers.{name}" for name in ("0.self_attention.dense", "2.mlp.dense_4h_to_h")}
MODULES = {
    "internlm2": {"model.layers.0.attention.wqkv", "model.layers.2.feed_forward.w2"},
    "bailing_moe": {"model.layers.0.attention.query_key_value", "model.layers.2.mlp.shared_experts.down_proj"},
    "param2moe": {"model.layers.0.attention.query_key_value", "model.layers.2.mlp.shared_experts.down_proj"},
    "chatglm": _CHATGLM,
    "chatglm (with images)": _CHATGLM,
    "telechat": {"transformer.h.0.self_attention.key_value", "transformer.h.2.mlp.down_proj"},
    "deepseek_vl_v2 (OCR)": _SHARED,
    "deepseek_vl_v2 (OCR 2)": _SHARED,
    "intern_s2_preview": {"model.layers.1.self_attn.o_proj", "model.layers.2.mlp.shared_expert.down_proj"},
}


@pytest.mark.parametrize("family", OWN)
def test_a_checkpoint_with_code_is_read_and_its_code_is_not_run(family: str, tmp_path: Path) -> None:
    folder, ran = save(tmp_path / "model", family), tmp_path / "ran"
    assert json.loads((folder / "config.json").read_text())["auto_map"]
    for name in ("configuration_own.py", "modeling_own.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')")
    dtype = "bfloat16" if family in IN_BFLOAT16 else "float32"
    found = load_front_model(tiny_config(folder, engine="vllm", dtype=dtype))
    assert found.model_type == family.partition(" ")[0] and check_checkpoint(str(folder)) and not ran.exists()
    assert MODULES.get(family, _USUAL) < set(found.shapes)
    config = load_config(str(folder))
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict(), "vLLM sends it to its processes"
    assert found.is_multimodal == (family in MULTIMODAL or "images" in family)


@pytest.mark.parametrize(
    ("family", "part", "changes", "refusal"),
    [
        ("ultravox", "", {"text_model_id": "owner/model"}, "text_model_id names another checkpoint, owner/model"),
        ("minicpmv (version 2.6)", "", {"version": 2.0}, "version 2.0 is none of those that are served"),
        ("minicpmo", "", {"version": "4.0"}, "version 4.0 is none of those that are served"),
        ("deepseek_vl_v2 (OCR)", "language_config", {"qk_rope_head_dim": 64}, "qk_rope_head_dim must be 0"),
        ("bailing_moe", "", {"score_function": None}, "score_function must be 'sigmoid', got None"),
        ("bailing_moe", "", {"moe_shared_expert_intermediate_size": 64}, "moe_shared_expert_intermediate_size must be"),
        ("bailing_moe", "", {"rotary_dim": 32}, "rotary_dim must be 16, got 32"),
        ("param2moe", "", {"n_group": 2}, "n_group must be 1, got 2"),
        ("param2moe", "", {"score_function": "softmax"}, "score_function must be 'sigmoid', got 'softmax'"),
        ("param2moe", "", {"moe_shared_expert_intermediate_size": 32}, "intermediate_size must be 64, got 32"),
        ("internlm2", "", {"bias": True}, "bias must be False, got True"),
        ("chatglm", "", {"original_rope": False}, "original_rope must be True, got False"),
        ("chatglm", "", {"kv_channels": 64}, "kv_channels must be 32, got 64"),
        ("chatglm (with images)", "", {"architectures": ["ChatGLMModel"]}, "architectures must be"),
        ("telechat", "", {"embed_layernorm": True}, "embed_layernorm must be False, got True"),
        ("telechat", "", {"num_key_value_heads": 2}, "num_key_value_heads must be 4, got 2"),
        ("solar", "", {"logit_scale": 0.5}, "logit_scale must be 1.0, got 0.5"),
    ],
)
def test_what_vllm_computes_otherwise_is_refused_by_name(
    family: str, part: str, changes: dict[str, object], refusal: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, family)
    written = json.loads((folder / "config.json").read_text())
    (written[part] if part else written).update(changes)
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(BaseModelUnsupported, match=refusal):
        load_front_model(tiny_config(folder, engine="vllm"))


def test_param2_names_its_experts_as_its_authors_do() -> None:
    names = {"num_experts": 8, "num_shared_experts": 2, "moe_intermediate_size": 64}
    config = Param2MoEConfig(**names, moe_shared_expert_intermediate_size=128, rope_theta=600_000.0, head_dim=32)
    assert (config.n_routed_experts, config.n_shared_experts, config.rope_parameters["rope_theta"]) == (8, 2, 600_000)
    assert not hasattr(config, "moe_shared_expert_intermediate_size"), "vLLM would take it as the width of one expert"


def test_positions_end_where_the_authors_code_computes_others() -> None:
    assert TeleChat2Config(seq_length=4096, base_seqlen=2048).max_position_embeddings == 2048
    assert SolarConfig(max_position_embeddings=4096, sliding_window=2047).max_position_embeddings == 2047


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_fused_layer_has_queries_keys_and_values_by_groups(name: str, tmp_path: Path) -> None:
    model = auto_class(config := load_config(str(save(tmp_path, "internlm2")))).from_config(config)
    attention, x = model.model.layers[0].attention, torch.randn(5, 128)
    groups = attention.wqkv(x).view(5, 2, 4, 32)  # two heads of queries, one of keys and one of values in each
    places = {"q_proj": slice(0, 2), "k_proj": slice(2, 3), "v_proj": slice(3, 4)}[name]
    assert getattr(attention, name)(x).equal(groups[:, :, places].reshape(5, -1))


def test_the_class_of_vllm_does_not_replace_that_of_the_weights(tmp_path: Path) -> None:
    folder = save(tmp_path, "bagel")

    class OtherConfig(PreTrainedConfig):  # type: ignore[misc]
        model_type = "bagel"

    AutoConfig.register("bagel", OtherConfig, exist_ok=True)
    assert isinstance(load_config(str(folder)), BagelConfig)


def test_the_language_model_of_a_chat_model_answers_under_both_names_of_its_settings(tmp_path: Path) -> None:
    folder = save(tmp_path, "internvl_chat")
    written = json.loads((folder / "config.json").read_text())
    written["llm_config"] = written.pop("text_config")
    (folder / "config.json").write_text(json.dumps(written))
    model = auto_class(config := load_config(str(folder))).from_pretrained(folder)
    tokens = torch.tensor([[1, 2, 3]])
    assert config.text_config.hidden_size == 128
    assert model(tokens).logits.equal(model.language_model(tokens).logits)


def test_settings_that_a_file_leaves_out_are_those_of_the_authors_class(tmp_path: Path) -> None:
    folder = save(tmp_path / "tied", "minicpm")
    written = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    auto_class(config := load_config(str(folder))).from_pretrained(
        folder, config=type(config)(**written)
    ).save_pretrained(folder)
    written.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(written))
    assert check_checkpoint(str(folder))
    pangu = PanguEmbeddedConfig(hidden_size=64)
    assert (pangu.attention_bias, pangu.rms_norm_eps) == (True, 1e-5)
    assert pangu.rope_parameters["rope_theta"] == 16_000_000
    assert not PanguEmbeddedConfig(hidden_size=64, bias=False).attention_bias


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "clip_text_model", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}},
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "flash_attention_2"},
        {"hidden_size": "x"},
    ],
)
def test_a_file_that_names_code_is_never_asked_about(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on the terminal whether to run code; whoever pipes `yes` into the server would agree."""
    folder, ran = save(tmp_path / "model", "llama"), tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | settings))
    try:
        found = load_front_model(tiny_config(folder, engine="vllm"))
    except BaseModelUnsupported as exc:
        assert "model_type" in settings or "hidden_size" in settings, exc
    else:
        assert found.model_type == "llama"
    assert not ran.exists()


def test_the_adapters_of_phi_4_multimodals_authors_are_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path, "phi4mm")
    written = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    model = auto_class(config := load_config(str(folder))).from_pretrained(folder)
    assert model.get_parameter(f"{name}.weight").equal(written[f"{name}.base_layer.weight"])
    assert isinstance(config.get_text_config(), Phi3Config) and config.get_text_config().hidden_size == 128


def test_tele_flm_scales_as_its_report_says() -> None:
    """Source: Tele-FLM technical report (arXiv 2404.16645), section on hyperparameters."""
    config = TeleFLMConfig(hidden_size=256, use_mup=True, input_mult=1.5, output_mult=4, mup_scale_factor=16)
    assert (config.embedding_multiplier, config.logits_scaling) == (1.5, 4)
    assert TeleFLMConfig(hidden_size=256, use_mup=False, input_mult=2.0).embedding_multiplier == 1


def test_minicpm_scales_as_its_paper_says() -> None:
    """Source: MiniCPM (arXiv 2404.06395), table of the scaling of widths and depths."""
    settings = {"hidden_size": 2304, "num_hidden_layers": 40, "num_attention_heads": 36}
    config = MiniCPMConfig(**settings, scale_emb=12, scale_depth=1.4, dim_model_base=256)
    assert (config.embedding_multiplier, config.logits_scaling, config.attention_multiplier) == (12, 9, 0.125)
    assert config.residual_multiplier == pytest.approx(1.4 / 40**0.5)
