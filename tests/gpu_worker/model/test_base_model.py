"""Supported base models, and refusals with the reason."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gpu_worker.config import PACKAGED_MODEL, WorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.front.text.incremental_detokenizer import IncrementalDetokenizer
from gpu_worker.model import base_model
from gpu_worker.model.base_model import (
    BaseModel,
    load_base_model,
    load_config,
    load_tokenizer,
    model_source,
    resolve_dtype,
    sampling_defaults,
)
from gpu_worker.model.packed_attention import ATTENTION_NAME
from gpu_worker.vllm.front_model import FrontModel, load_front_model
from tests.gpu_worker.families import REFUSED_UNLOADED, Settings
from tests.gpu_worker.model.test_checkpoint import copy_with, without
from tests.tiny import FAMILIES, TinyBase, TinyFolders, byte_tokenizer, change_json, tiny_config


def folder_with(tmp_path: Path, source: Path, **changes: object) -> Path:
    """Write a folder with `source`'s config and these changes, but no weights: it is refused before loading."""
    config = AutoConfig.from_pretrained(source)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "weights quantised by bitsandbytes; .* use engine 'vllm', or dequantise the weights and save",
        ),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"kv_lora_rank": 64}, "latent attention"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(
    changes: dict[str, object], reason: str, tmp_path: Path, tiny_folders: TinyFolders
) -> None:
    folder = folder_with(tmp_path, tiny_folders["gemma3"], **changes)
    with pytest.raises(BaseModelUnsupported, match=f"gemma3_text has .*{reason}"):
        load_base_model(tiny_config(folder))


def test_the_native_engine_refuses_a_checkpoint_without_a_layer(tmp_path: Path, tiny_folders: TinyFolders) -> None:
    folder = copy_with(without("layers.1."), tiny_folders["llama"], tmp_path / "broken")
    with pytest.raises(BaseModelUnsupported, match="9 of the model's 30 tensors are missing"):
        load_base_model(tiny_config(folder))


def test_four_bits_are_closer_where_inputs_are_large(tmp_path: Path, tiny_folders: TinyFolders) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    first = model.get_submodule("model.layers.0")
    with torch.no_grad():
        first.input_layernorm.weight[:4] = 50  # four of 32 inputs are large
    model.save_pretrained(folder)
    rounded = load_base_model(tiny_config(folder, dtype="bfloat16", quantization="int4")).model
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = rounded.get_submodule(f"model.layers.0.self_attn.{name}").weight
        errors = (weight.float() - first.self_attn.get_submodule(name).weight).abs().mean(dim=0)
        assert errors[:4].mean() < 0.6 * errors[4:].mean(), name
    assert rounded.config._attn_implementation == ATTENTION_NAME


def test_all_problems_are_named_at_once(tmp_path: Path, tiny_folders: TinyFolders) -> None:
    folder = folder_with(tmp_path, tiny_folders["gemma3"], kv_lora_rank=64, is_encoder_decoder=True)
    with pytest.raises(BaseModelUnsupported, match=r"encoder-decoder.*latent attention"):
        load_base_model(tiny_config(folder))


@pytest.mark.parametrize("head_dim", [12, 264])
def test_head_sizes_unsupported_on_cuda_are_refused_there(
    head_dim: int, tmp_path: Path, tiny_folders: TinyFolders
) -> None:
    folder = folder_with(tmp_path, tiny_folders["gemma3"], head_dim=head_dim)
    with pytest.raises(BaseModelUnsupported, match=f"head size of {head_dim}"):
        load_base_model(tiny_config(folder, device="cuda", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("bloom", {}, r"bloom has .*num_key_value_heads.*max_position"),  # older families use other names
        *[(name, settings, f"{name} {re.escape(reason)}") for name, (settings, reason) in REFUSED_UNLOADED.items()],
        # Recurrent and convolutional layers would carry state from one packed row to the next.
        *[(name, {}, name) for name in ("minimax", "granitemoehybrid", "qwen3_next")],
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "lfm2"),
    ],
)
def test_a_family_of_other_layers_is_refused_before_anything_is_loaded(
    model_type: str, settings: Settings, reason: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(BaseModelUnsupported, match=reason):
        load_base_model(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "llama", "hid', r"configuration of .* cannot be read .* Copy the model's files again"),
        ("[1]", r"configuration of .* cannot be read .* Copy the model's files again"),
        (
            {"rope_parameters": {"rope_type": "other", "rope_theta": 1e4}},
            r"cannot build or run the model .*'other'.* in its config.json",
        ),
        ({"hidden_act": "other"}, r"cannot build or run the model .*'other'.*: check the settings in its config.json"),
    ],
    ids=["cut", "a list", "rope_type", "hidden_act"],
)
def test_a_config_that_no_model_can_be_built_of_is_refused(
    text: str | dict[str, object], says: str, tiny_folders: TinyFolders, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    if isinstance(text, str):
        (folder / "config.json").write_text(text)
    else:
        change_json(folder / "config.json", text)
    with pytest.raises(BaseModelUnsupported, match=says):
        load_base_model(tiny_config(folder))


def test_code_of_a_checkpoint_is_refused_in_one_sentence_and_never_run(
    tiny_folders: TinyFolders, tmp_path: Path
) -> None:
    folder, ran = shutil.copytree(tiny_folders["llama"], tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    change_json(folder / "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    with pytest.raises(BaseModelUnsupported, match=r"own is no family of transformers .* runs no code") as found:
        load_config(str(folder))
    own_tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own_tokenizer))
    with pytest.raises(BaseModelUnsupported, match="tokenizer cannot be loaded") as found_of_tokenizer:
        load_tokenizer(tiny_config(folder))
    assert "\n" not in f"{found.value}{found_of_tokenizer.value}" and not ran.exists()


@pytest.mark.parametrize("is_file", [False, True])
def test_a_gguf_file_is_refused_with_what_to_use(is_file: bool, tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    folder = tmp_path / "model-q4.gguf" if is_file else tmp_path
    settings = tiny_config(folder, engine="vllm")
    with pytest.raises(BaseModelUnsupported, match=r"model-q4.gguf is a GGUF file, .* config.json and \*.safetensors"):
        load_config(model_source(settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_properties_that_the_engine_needs_are_read_from_the_model(family: str, tiny_base: TinyBase) -> None:
    base = tiny_base(family)
    assert (base.num_layers, base.num_kv_heads, base.head_dim, base.max_position) == (3, 2, 8, 512)
    assert base.eos_token_ids == {257}
    assert base.dtype == torch.float32
    assert base.model.config._attn_implementation == ATTENTION_NAME
    assert not base.model.training
    assert base.backend_tokenizer.token_to_id("<bos>") == 256


@pytest.mark.parametrize(
    ("family", "window", "layers"), [("gemma3", 12, {0, 2}), ("mistral", 12, set()), ("llama", None, set())]
)
def test_layers_with_a_window_are_known_where_others_have_none(
    family: str, window: int | None, layers: set[int], tiny_base: TinyBase
) -> None:
    base = tiny_base(family)
    assert (base.window, base.window_layers) == (window, layers)


def test_every_declared_end_ends_an_answer(tmp_path: Path, tiny_folders: TinyFolders) -> None:
    base = load_base_model(tiny_config(tiny_folders["llama"]))
    base.model.generation_config.eos_token_id = [257, 250]
    base.model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_base_model(tiny_config(tmp_path)).eos_token_ids == {257, 250}


@pytest.mark.parametrize("load", [load_base_model, load_front_model])
def test_an_end_id_outside_the_vocabulary_is_left_out(
    load: Callable[[Any], BaseModel | FrontModel],
    tiny_folders: TinyFolders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    config = tiny_config(folder, engine="native" if load is load_base_model else "vllm")
    assert load(config).eos_token_ids == {257} and not caplog.messages
    change_json(folder / "generation_config.json", {"eos_token_id": [257, 299, 300, -1]})
    assert load(config).eos_token_ids == {257, 299}
    [message] = caplog.messages
    assert "the end ids -1, 300 " in message and "from 0 to 299" in message and "generation_config.json" in message


@pytest.mark.parametrize("text", ['{"eos_token_id": [257, 2', "[257]", b"\xff"], ids=["cut", "a list", "no text"])
def test_a_broken_generation_config_is_refused(text: str | bytes, tiny_folders: TinyFolders, tmp_path: Path) -> None:
    """It may be the only file that names the end of an answer."""
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BaseModelUnsupported, match=r"generation_config.json is not a JSON object. Copy the model's"):
        load_base_model(tiny_config(folder))
    with pytest.raises(BaseModelUnsupported, match=r"generation_config.json is not a JSON object. Copy the model's"):
        load_front_model(tiny_config(folder, engine="vllm"))


def test_the_dtype_is_the_configured_one(tiny_folders: TinyFolders) -> None:
    base = load_base_model(tiny_config(tiny_folders["llama"], dtype="bfloat16"))
    assert base.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("capability", "dtype"), [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)]
)
def test_a_processor_without_bfloat16_is_logged_once(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    with caplog.at_level("INFO"):
        assert resolve_dtype("auto") == dtype
        assert resolve_dtype("float32") == torch.float32  # chosen, so nothing is said
        assert resolve_dtype("auto", "cuda") == resolve_dtype("bfloat16") == torch.bfloat16
    said = ["this processor has no AVX-512 or AMX instructions for bfloat16: products are float32"]
    assert caplog.messages == (said if dtype == torch.float32 else [])


def test_a_folder_or_an_id_is_loaded_under_its_own_name() -> None:
    assert model_source(tiny_config(Path("/models/mine"))) == "/models/mine"
    assert model_source(tiny_config(Path("google/gemma-3-270m"))) == "google/gemma-3-270m"


def test_a_complete_conversion_in_the_cache_is_reused(tmp_path: Path) -> None:
    folder = tmp_path / PACKAGED_MODEL
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
    assert model_source(WorkerConfig(cache_dir=tmp_path)) == str(folder)
    assert (folder / "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize("own", [None, "own {{ messages }}"])
def test_the_operators_chat_template_replaces_the_models(tmp_path: Path, own: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(WorkerConfig(base_model=str(tmp_path))).chat_template == own
    replaced = load_tokenizer(WorkerConfig(base_model=str(tmp_path), chat_template="mine {{ messages }}"))
    assert replaced.chat_template == "mine {{ messages }}"


def test_the_operators_sampling_comes_before_the_base_models_own(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    given = (("temperature", 0.0), ("top_p", 0.9))
    config = WorkerConfig(base_model=str(tmp_path), sampling_defaults=given)
    assert sampling_defaults(config) == {"temperature": 0.0, "top_k": 20, "top_p": 0.9}
    assert sampling_defaults(replace(config, generation_config="none")) == dict(given)


def test_the_markers_of_the_packaged_model_have_no_text_in_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = byte_tokenizer()
    converted.add_tokens(["[multimodal]", "<start_of_image>", "<end_of_image>", "<table>"])
    converted.save_pretrained(tmp_path)
    monkeypatch.setattr(base_model, "packaged_folder", lambda cache_dir, keeps_integers: tmp_path)
    text = "a<start_of_image>b[multimodal]<end_of_image>c<table>"
    for source, shown in ((str(tmp_path), text), (PACKAGED_MODEL, "abc<table>")):
        found = load_tokenizer(WorkerConfig(base_model=source)).backend_tokenizer
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == converted.backend_tokenizer.encode(text, add_special_tokens=False).ids and len(ids) == 7
        assert found.decode(ids, skip_special_tokens=True) == shown
        stream = IncrementalDetokenizer(found, [])
        assert "".join(map(stream.push, ids)) + stream.finish() == shown


def test_the_packaged_models_tokenizer_reads_its_file_as_transformers_own_class_does() -> None:
    source = model_source(WorkerConfig())
    own, found = AutoTokenizer.from_pretrained(source), load_tokenizer(WorkerConfig(), source)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template")
    assert [getattr(found, name) for name in names] == [getattr(own, name) for name in names]
    texts = [
        "",
        " a  b\n\n\tc ",
        "Ünïcödé 漢字 🙂 \u200b",
        "<start_of_turn>user\nhi<end_of_turn><unused7></b>",
        "\x00\ud7ff",
    ]
    for text in texts:
        ids = own(text).input_ids
        assert found(text).input_ids == ids
        assert found.backend_tokenizer.encode(text).ids == ids and found.decode(ids) == own.decode(ids)
    assert found.get_vocab() == own.get_vocab() and len(found) > 262_000


def test_a_tokenizer_that_asks_for_truncation_and_padding_reads_texts_whole(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(WorkerConfig(base_model=str(tmp_path)))
    assert found.backend_tokenizer.encode("abcde").ids == found("abcde").input_ids
