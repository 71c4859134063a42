"""vLLM gets the settings and the weights of a model that its class of the whole does not read. Needs vLLM."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from torch import nn
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.vllm.language_model import FORMAT, LanguageModelLoader, find_arguments, name_in_part, register_loader
from tests.gpu_worker.conformance.families import save


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["voxtral", "exaone"])
def test_vllm_gets_the_settings_of_the_language_model_with_its_class(
    family: str, is_tied: bool, tmp_path: Path
) -> None:
    save(tmp_path, family)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": is_tied}))
    found = find_arguments(str(tmp_path), family)
    config = pickle.loads(pickle.dumps(found["hf_overrides"]))(None)
    assert (
        config.architectures == ["LlamaForCausalLM"] and config.hidden_size == 128 and not found["language_model_only"]
    )
    assert config.tie_word_embeddings == is_tied, "a setting of the whole"


def test_quantised_weights_beside_other_parts_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "voxtral")
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BaseModelUnsupported, match="does not support voxtral with quantised weights"):
        find_arguments(str(tmp_path), "voxtral")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.backbone.layers.0.mixer.D", "backbone.layers.0.mixer.D"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.audio_tower.layers.0.fc1.weight", None),
        ("vision_model.language_model_norm.weight", None),
    ],
)
def test_a_tensor_has_its_name_in_the_language_model_or_is_left_out(name: str, expected: str | None) -> None:
    assert name_in_part(name) == expected


def test_a_weight_that_no_file_has_ends_the_start() -> None:
    register_loader()
    loader = get_model_loader(LoadConfig(load_format=FORMAT))
    model = nn.ModuleDict({"norm": nn.Linear(2, 2, bias=False)})
    assert isinstance(loader, LanguageModelLoader)
    loader.track_weights_loading(model, {"norm.weight"})
    with pytest.raises(ValueError, match=r"norm\.weight"):
        loader.track_weights_loading(model, set())
