"""Families whose checkpoints bring code are read by classes of transformers, and that code is never run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Phi3Config, PreTrainedConfig, Qwen3_5MoeForConditionalGeneration

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.authors_layers import PLaMo3Config
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
from gpu_worker.vllm.front_model import language_part, load_front_model
from tests.gpu_worker.conformance.families import FAMILIES, IN_BFLOAT16, MULTIMODAL, save
from tests.gpu_worker.model.slow_families import slow_logits
from tests.tiny import change_json, tiny_config

OWN = [family for family in FAMILIES if family.partition(" ")[0] in OWN_FAMILIES]
SLOW = (
    "nemotron-nas",
    "molmo",
    "molmo (with OLMo)",
    "plamo3",
    "k2_horizon",
    "k2_horizon (with gates)",
)
_USUAL = {"model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"}
_SHARED = {"model.layers.0.self_attn.o_proj", "model.layers.2.mlp.shared_experts.down_proj"}
_CHATGLM = {f"transformer.encoder.layers.{name}" for name in ("0.self_attention.dense", "2.mlp.dense_4h_to_h")}
_ATTENTION: dict[str, object] = {"n_heads_in_group": 2, "no_op": False}
NO_ATTENTION = {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0, "no_op": False}}
LINEAR = {**NO_ATTENTION, "attention": {**_ATTENTION, "replace_with_linear": True}}
OTHER_GROUPS = [{**NO_ATTENTION, "attention": {**_ATTENTION, "n_heads_in_group": size}} for size in (1, 2, 4)]
GELU = {"attention": _ATTENTION, "ffn": {"ffn_mult": 1.0, "no_op": False, "hidden_act": "gelu"}}
_MOLMO = {f"model.transformer.blocks.{name}" for name in ("0.att_proj", "0.attn_out", "2.ff_proj", "2.ff_out")}
MODULES = {
    "internlm2": {"model.layers.0.attention.wqkv", "model.layers.2.feed_forward.w2"},
    "bailing_moe": {"model.layers.0.attention.query_key_value", "model.layers.2.mlp.shared_experts.down_proj"},
    "param2moe": {"model.layers.0.attention.query_key_value", "model.layers.2.mlp.shared_experts.down_proj"},
    "chatglm": _CHATGLM,
    "chatglm (with images)": _CHATGLM,
    "telechat": {"transformer.h.0.self_attention.key_value", "transformer.h.2.mlp.down_proj"},
    "deepseek_vl_v2 (OCR)": _SHARED,
    "deepseek_vl_v2 (OCR 2)": _SHARED,
    "nemotron-nas": {"model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"},
    "plamo3": {"model.layers.layers.0.mixer.qkv_proj", "model.layers.layers.2.mlp.gate_up_proj"},
    "molmo": _MOLMO,
    "molmo (with OLMo)": _MOLMO,
    "interns2_mobius": {"model.layers.2.mlp.shared_expert.down_proj", "model.meta_mlp.1.experts.down_proj"},
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
        ("chatglm", "", {"rope_ratio": 16}, "rope_ratio must be 1 or at least 50, got 16"),
        ("chatglm", "", {"kv_channels": 64}, "kv_channels must be 32, got 64"),
        ("chatglm (with images)", "", {"architectures": ["ChatGLMModel"]}, "architectures must be"),
        ("telechat", "", {"embed_layernorm": True}, "embed_layernorm must be False, got True"),
        ("telechat", "", {"num_key_value_heads": 2}, "num_key_value_heads must be 4, got 2"),
        ("nemotron-nas", "", {"block_configs": []}, "block_configs must have num_hidden_layers 3 items, got 0"),
        ("nemotron-nas", "", {"block_configs": [{}] * 3}, r"block_configs\[0\] must have attention"),
        (
            "nemotron-nas",
            "",
            {"block_configs": [NO_ATTENTION] * 3},
            r"block_configs\[0\].attention.no_op must be False",
        ),
        ("nemotron-nas", "", {"block_configs": OTHER_GROUPS}, "n_heads_in_group must be the same in all layers"),
        ("nemotron-nas", "", {"block_configs": [LINEAR] * 3}, "attention.replace_with_linear must be absent, got True"),
        ("nemotron-nas", "", {"block_configs": [GELU] * 3}, "ffn.hidden_act must be 'silu', got 'gelu'"),
        ("nemotron-nas", "", {"position_embedding_type": "rope_llama4"}, "position_embedding_type must be 'rope'"),
        ("molmo", "", {"weight_tying": True}, "weight_tying must be False, got True"),
        ("molmo", "", {"layer_norm_type": "default"}, "layer_norm_type must be 'rms', got 'default'"),
        ("plamo3", "", {"scale_embedding": True}, "scale_embedding must be False, got True"),
        ("plamo3", "", {"interleaved_sliding_window": [24, 8, None]}, "windows of the 3 layers must be one size"),
        ("k2_horizon", "", {"num_experts": 8}, "num_experts must be 0, got 8"),
        ("k2_horizon", "", {"mova_num_experts": 8}, "mova_num_experts must be 0, got 8"),
        ("k2_horizon", "", {"rope_head_dim": 16}, "rope_head_dim must be 32, got 16"),
        (
            "k2_horizon",
            "",
            {"attention_gate_func": "tanh"},
            "attention_gate_func must be one of silu, softplus, got tanh",
        ),
        ("interns2_mobius", "text_config", {"layer_scale": True}, "layer_scale must be False, got True"),
        ("solar", "", {"logit_scale": 0.5}, "logit_scale must be 1.0, got 0.5"),
    ],
)
def test_what_vllm_computes_otherwise_is_refused_by_name(
    family: str, part: str, changes: dict[str, object], refusal: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, family)
    change_json(folder / "config.json", {part: changes} if part else changes)
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
    change_json(folder / "config.json", settings)
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


@pytest.mark.parametrize("family", SLOW)
def test_a_class_computes_what_the_authors_names_and_formulas_say(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():  # norms are ones or zeros at first
        if tensor.ndim == 1:
            tensors[name] = tensor + torch.randn(tensor.shape) / 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = auto_class(config := load_config(str(folder))).from_pretrained(
        folder, config=config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = torch.randint(0, 256, (40,)).tolist()  # more than a window
    found = language_part(whole)(input_ids=torch.tensor([tokens])).logits[0]
    assert (found - slow_logits(folder, tokens)).abs().max() < 1e-4


def test_layers_that_share_a_bank_of_experts_compute_as_if_each_had_its_own(tmp_path: Path) -> None:
    model = auto_class(config := load_config(str(save(tmp_path, "interns2_mobius")))).from_config(config)
    qwen = Qwen3_5MoeForConditionalGeneration(config)
    tensors = model.state_dict()
    for name in [name for name in qwen.state_dict() if ".mlp.gate." in name or ".mlp.experts." in name]:
        number = int(name.split(".layers.")[1].split(".")[0])
        bank = f"model.language_model.meta_mlp.{number % 2}"
        tensors[name] = tensors[f"{bank}.{name.split('.mlp.')[1]}"]
    qwen.load_state_dict({name: each for name, each in tensors.items() if ".meta_mlp." not in name})
    tokens = torch.tensor([[1, 2, 3, 250]])
    with torch.no_grad():
        assert model.eval()(tokens).logits.allclose(qwen.eval()(tokens).logits, atol=1e-6)


def test_a_tokenizer_that_needs_the_code_of_its_checkpoint_is_refused(tmp_path: Path) -> None:
    folder, ran = save(tmp_path / "model", "plamo3"), tmp_path / "ran"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenization_own.py").write_text(f"open({str(ran)!r}, 'w')")
    names = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(BaseModelUnsupported, match=r"tokenizer cannot be loaded .*contains custom code") as found:
        load_front_model(tiny_config(folder, engine="vllm"))
    assert "\n" not in str(found.value) and not ran.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"window_size": 24, "sliding_window_pattern": 2},
        {"sliding_window": 24, "sliding_window_pattern": 2},
        {"sliding_window": [24, None, 24, None]},
        {"interleaved_sliding_window": [24, None, 24, None], "sliding_window": 24},
    ],
)
def test_plamo_3_has_the_same_windows_however_its_file_names_them(settings: dict[str, object]) -> None:
    config = PLaMo3Config(num_hidden_layers=4, rope_theta=1e6, **settings)
    assert (config.interleaved_sliding_window, config.sliding_window) == ([24, None, 24, None], 24)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"sliding_attention": 10_000, "full_attention": 1e6}


def test_plamo_3_stretches_the_positions_of_full_attention_only() -> None:
    config = PLaMo3Config(rope_scaling_factor=4, initial_context_length=1024)
    rope = config.rope_parameters["full_attention"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 1024)
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
