"""Families whose checkpoints bring code are read by classes of transformers, and that code is never run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import load_config
from gpu_worker.model.checkpoint import auto_class, check_checkpoint
from gpu_worker.model.own_families import OWN_FAMILIES, MiniCPMConfig, PanguEmbeddedConfig, TeleFLMConfig
from gpu_worker.vllm.front_model import load_front_model
from tests.gpu_worker.conformance.families import save
from tests.tiny import tiny_config


@pytest.mark.parametrize("family", OWN_FAMILIES)
def test_a_checkpoint_with_code_is_read_and_its_code_is_not_run(family: str, tmp_path: Path) -> None:
    folder, ran = save(tmp_path / "model", family), tmp_path / "ran"
    assert json.loads((folder / "config.json").read_text())["auto_map"]
    for name in ("configuration_own.py", "modeling_own.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')")
    found = load_front_model(tiny_config(folder, engine="vllm"))
    assert found.model_type == family and check_checkpoint(str(folder)) and not ran.exists()
    assert {"model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"} < set(found.shapes)
    config = load_config(str(folder))
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict(), "vLLM sends it to its processes"
    assert found.is_multimodal == ("vision_config" in json.loads((folder / "config.json").read_text()))


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


def test_models_scale_as_their_authors_say() -> None:
    """Source: Tele-FLM technical report (arXiv 2404.16645), section on hyperparameters; MiniCPM (arXiv 2404.06395),
    table of the scaling of widths and depths.
    """
    tele = TeleFLMConfig(hidden_size=256, use_mup=True, input_mult=1.5, output_mult=4, mup_scale_factor=16)
    assert (tele.embedding_multiplier, tele.logits_scaling) == (1.5, 4)
    assert TeleFLMConfig(hidden_size=256, use_mup=False, input_mult=2.0).embedding_multiplier == 1
    settings = {"hidden_size": 2304, "num_hidden_layers": 40, "num_attention_heads": 36}
    config = MiniCPMConfig(**settings, scale_emb=12, scale_depth=1.4, dim_model_base=256)
    assert (config.embedding_multiplier, config.logits_scaling, config.attention_multiplier) == (12, 9, 0.125)
    assert config.residual_multiplier == pytest.approx(1.4 / 40**0.5)
