"""vLLM gets the settings and the weights of a model that its class of the whole does not read. Needs vLLM."""

from __future__ import annotations

import json
import pickle
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MistralConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models.mistral import MistralForCausalLM

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import load_tokenizer, model_source
from gpu_worker.model.checkpoint import auto_class, read_config
from gpu_worker.vllm.front_model import language_part
from gpu_worker.vllm.language_model import FORMAT, LanguageModelLoader, find_arguments, name_in_part, register_loader
from tests.gpu_worker.conformance.families import MISTRAL, save
from tests.tiny import change_json, tiny_config


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["voxtral", "exaone"])
def test_vllm_gets_the_settings_of_the_language_model_with_its_class(
    family: str, is_tied: bool, tmp_path: Path
) -> None:
    save(tmp_path, family)
    change_json(tmp_path / "config.json", {"tie_word_embeddings": is_tied})
    found = find_arguments(str(tmp_path), family)
    config = pickle.loads(pickle.dumps(found["hf_overrides"]))(None)
    assert (
        config.architectures == ["LlamaForCausalLM"] and config.hidden_size == 128 and not found["language_model_only"]
    )
    assert config.tie_word_embeddings == is_tied, "a setting of the whole"


def read_weights(folder: str, text_config: Any) -> Iterator[tuple[str, Tensor]]:
    model_config: Any = SimpleNamespace(model=folder, revision=None, hf_config=text_config)
    loader: Any = get_model_loader(LoadConfig(load_format=FORMAT))
    yield from loader.get_all_weights(model_config, nn.Module())


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("blip-2", "OPTForCausalLM"),
        ("cosmos3_omni", "Qwen3ForCausalLM"),
        ("ernie4_5_vl_moe", "Ernie4_5_MoeForCausalLM"),
        ("moss_audio", "Qwen3ForCausalLM"),
        ("nemotron_h_omni", "NemotronHForCausalLM"),
        ("openpangu_vl", "PanguEmbeddedForCausalLM"),
        ("qwen3_asr", "Qwen3ForCausalLM"),
    ],
)
def test_vllm_gets_the_tensors_of_the_language_model_under_their_names(
    family: str, architecture: str, tmp_path: Path
) -> None:
    folder = str(save(tmp_path, family))
    text = find_arguments(folder, family)["hf_overrides"](None)
    assert text.architectures == [architecture]
    assert not any(name.startswith("mrope_") for name in getattr(text, "rope_parameters", None) or ())
    found = dict(read_weights(folder, text))
    whole = auto_class(read_config(folder)).from_pretrained(folder)
    decoder, head = (part := language_part(whole)).get_decoder(), part.get_output_embeddings().weight
    name = "model.decoder" if family == "blip-2" else "model"
    expected = {f"{name}.{path}": tensor for path, tensor in decoder.state_dict().items()}
    expected = {path: tensor for path, tensor in expected.items() if "_moe." not in path}
    theirs = {path: tensor for path, tensor in found.items() if ".mlp.experts." not in path}
    if family == "ernie4_5_vl_moe":
        theirs = {path: tensor for path, tensor in theirs.items() if ".gate." not in path}
    assert head.equal(theirs.pop("lm_head.weight", head))
    theirs = {path.replace("backbone.", "model."): tensor for path, tensor in theirs.items() if "moe_" not in path}
    assert theirs.keys() == expected.keys() and all(theirs[path].equal(each) for path, each in expected.items())


def test_experts_for_images_are_left_out(tmp_path: Path) -> None:
    folder = str(save(tmp_path, "ernie4_5_vl_moe"))
    whole = auto_class(read_config(folder)).from_pretrained(folder)
    block = language_part(whole).get_decoder().layers[1].mlp.text_moe
    text = find_arguments(folder, "ernie4_5_vl_moe")["hf_overrides"](None)
    assert (text.moe_intermediate_size, text.moe_layer_start_index, text.moe_num_experts) == (32, 1, 4)
    found = {
        name.removeprefix("model.layers.1.mlp."): tensor
        for name, tensor in read_weights(folder, text)
        if name.startswith("model.layers.1.mlp.") and "shared" not in name
    }
    expected = {
        "gate.weight": block.gate.weight,
        "moe_statics.e_score_correction_bias": block.gate.moe_statics.e_score_correction_bias,
    }
    for number in range(4):
        gate, up = block.experts.gate_up_proj[number].chunk(2)
        expected |= {f"experts.{number}.gate_proj.weight": gate, f"experts.{number}.up_proj.weight": up}
        expected[f"experts.{number}.down_proj.weight"] = block.experts.down_proj[number]
    assert found.keys() == expected.keys() and all(found[name].equal(each) for name, each in expected.items())


def test_the_fused_layers_of_molmo_2_are_those_of_qwen_3(tmp_path: Path) -> None:
    folder = str(save(tmp_path, "molmo2"))
    decoder = language_part(auto_class(read_config(folder)).from_pretrained(folder)).get_decoder()
    text = find_arguments(folder, "molmo2")["hf_overrides"](None)
    found, layer = dict(read_weights(folder, text)), "model.layers.1"
    attention, mlp = decoder.layers[1].self_attn, decoder.layers[1].mlp
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    expected = {f"{layer}.self_attn.qkv_proj.weight": fused, f"{layer}.mlp.up_proj.weight": mlp.up_proj.weight}
    expected |= {
        f"{layer}.mlp.gate_proj.weight": mlp.gate_proj.weight,
        f"{layer}.mlp.down_proj.weight": mlp.down_proj.weight,
    }
    expected |= {
        "model.embed_tokens.weight": decoder.embed_tokens.weight[:300],
        "model.norm.weight": decoder.norm.weight,
    }
    assert (
        all(found[name].equal(weight) for name, weight in expected.items()) and len(decoder.embed_tokens.weight) == 308
    )
    change_json(tmp_path / "config.json", {"text_config": {"qk_norm_type": "olmo"}})
    with pytest.raises(BaseModelUnsupported, match="serves molmo2 only if its language model is that of Qwen 3"):
        find_arguments(folder, "molmo2")


def test_other_classes_of_vllm_get_the_settings_that_they_ask_for(tmp_path: Path) -> None:
    param2, axk1 = (find_arguments(str(save(tmp_path / each, each)), each) for each in ("param2moe", "axk1"))
    assert param2 == {"hf_overrides": {"architectures": ["BailingMoeV2ForCausalLM"]}}
    assert axk1 == {"hf_overrides": {"first_k_dense_replace": 1}}


def test_quantised_weights_beside_other_parts_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "voxtral")
    change_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "gptq"}})
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


def test_mistrals_own_format_is_converted_as_vllm_reads_it(tmp_path: Path) -> None:
    family = "mistral (as Pixtral in Mistral's format)"
    config = tiny_config(save(tmp_path / "whole", family) / MISTRAL, cache_dir=tmp_path / "cache")
    source = Path(model_source(config))
    reader = SimpleNamespace(
        config=MistralConfig.from_pretrained(source), mistral_mapping=MistralForCausalLM.mistral_mapping
    )
    expected = {}
    for name, tensor in load_file(Path(config.base_model) / "consolidated.safetensors").items():
        if not name.startswith("vision"):
            theirs, weight = MistralForCausalLM.maybe_remap_mistral(reader, name, tensor)
            expected[theirs] = weight
    found = load_file(source / "model-00001.safetensors")
    assert found.keys() == expected.keys() and all(found[name].equal(each) for name, each in expected.items())


def test_a_tekken_file_gives_the_tokens_of_mistrals_own_tools(tmp_path: Path) -> None:
    folder = save(tmp_path / "whole", "mistral (as Pixtral in Mistral's format)") / MISTRAL
    tekken = json.loads((folder / "tekken.json").read_text())
    pieces = ["an", "the", " th", " the", "rr"]
    tekken["vocab"] += [
        {"rank": 256 + place, "token_bytes": b64encode(piece.encode()).decode()} for place, piece in enumerate(pieces)
    ]
    tekken["config"] |= {"default_vocab_size": 265, "num_vocab_tokens": 261, "version": "v7"}
    tekken["vocab"] = [each | {"token_str": None} for each in tekken["vocab"]]
    tekken["special_tokens"] = [each | {"is_control": True} for each in tekken["special_tokens"]]
    (folder / "tekken.json").write_text(json.dumps(tekken))
    tokenizer = load_tokenizer(tiny_config(folder, cache_dir=tmp_path / "cache"))
    own = Tekkenizer.from_file(folder / "tekken.json")
    for text in ("the parrot, then another", " x" * 20, "", "ümläut 日本語 😀\n\n\tthe"):
        assert tokenizer(text).input_ids == own.encode(text, bos=True, eos=False)
