from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model import mistral_format
from gpu_worker.model.base_model import load_base_model, load_tokenizer, model_source
from gpu_worker.model.checkpoint import check_checkpoint
from gpu_worker.model.mistral_format import converted_mistral, find_params
from tests.gpu_worker.conformance.families import MISTRAL, save
from tests.tiny import tiny_config

FAMILY = "mistral (as Pixtral in Mistral's format)"


@pytest.mark.parametrize("part_bytes", [2**31, 2**16])
def test_both_engines_read_the_language_model_that_was_written(
    part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mistral_format, "_PART_BYTES", part_bytes)
    folder = save(tmp_path / "whole", FAMILY)
    config = tiny_config(folder / MISTRAL, cache_dir=tmp_path / "cache")
    source = model_source(config)
    expected, found = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, source))
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys() and check_checkpoint(source)
    assert all(tensor.equal(tensors[name]) for name, tensor in expected.state_dict().items())
    assert (len(list(Path(source).glob("*.safetensors"))) > 1) == (part_bytes < 2**31)
    base = load_base_model(config)
    assert base.eos_token_ids == {2} and base.max_position == 512 and base.window is None
    assert load_tokenizer(config)("Héllo").input_ids == [1, *(4 + each for each in "Héllo".encode())]


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_that_changes_is_converted_again(keeps_time: bool, tmp_path: Path) -> None:
    params = save(tmp_path / "whole", FAMILY) / MISTRAL / "params.json"
    first = converted_mistral(params, tmp_path / "cache")
    assert converted_mistral(params, tmp_path / "cache") == first
    weights = params.with_name("consolidated.safetensors")
    tensors, before = load_file(weights), weights.stat()
    save_file(tensors | {"norm.weight": 2 * tensors["norm.weight"]}, weights)
    if keeps_time:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = AutoModelForCausalLM.from_pretrained(converted_mistral(params, tmp_path / "cache"))
    assert changed.model.norm.weight.equal(2 * torch.ones(128))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"moe": {"num_experts": 8}}, "has moe, which this server does not convert: use the folder"),
        ({"ada_rms_norm_t_cond": True, "causal": True}, "has ada_rms_norm_t_cond, which"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}, "activation": "gelu"}, "has quantization, activation, which"),
        ({"sliding_window": 4096, "moe": None}, "has sliding_window, which"),
        ({"dim": None}, "does not describe a model of Mistral"),
    ],
)
def test_settings_that_would_compute_otherwise_are_refused(
    changes: Mapping[str, Any], refusal: str, tmp_path: Path
) -> None:
    params = save(tmp_path / "whole", FAMILY) / MISTRAL / "params.json"
    written = json.loads(params.read_text()) | changes
    params.write_text(json.dumps({name: value for name, value in written.items() if name != "dim" or value}))
    with pytest.raises(BaseModelUnsupported, match=refusal):
        model_source(tiny_config(params.parent, cache_dir=tmp_path / "cache"))


def test_other_tensors_and_missing_files_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "whole", FAMILY) / MISTRAL
    weights, config = folder / "consolidated.safetensors", tiny_config(folder, cache_dir=tmp_path / "cache")
    tensors = load_file(weights)
    save_file(tensors | {"layers.0.attention.wq.qscale_weight": torch.ones(1)}, weights)
    with pytest.raises(BaseModelUnsupported, match=r"has layers\.0\.attention\.wq\.qscale_weight, which"):
        model_source(config)
    weights.write_bytes(b"")
    with pytest.raises(BaseModelUnsupported, match=r"safetensors cannot be read"):
        model_source(config)
    save_file({name: tensor for name, tensor in tensors.items() if "wo" not in name}, weights)
    with pytest.raises(BaseModelUnsupported, match=r"3 of the model's 30 tensors are missing .*o_proj"):
        check_checkpoint(model_source(config))
    (folder / "tekken.json").unlink()
    with pytest.raises(BaseModelUnsupported, match=r"has no tekken\.json: use the folder"):
        model_source(config)


def test_files_of_transformers_come_first(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert find_params(str(tmp_path)) == tmp_path / "params.json" and find_params("owner/model") is None
    (tmp_path / "config.json").write_text("{}")
    assert find_params(str(tmp_path)) is None


def test_lengths_and_ties_are_those_of_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "whole", FAMILY) / MISTRAL
    params = json.loads((folder / "params.json").read_text()) | {"max_seq_len": 96, "tied_embeddings": True}
    (folder / "params.json").write_text(json.dumps(params))
    source = model_source(tiny_config(folder, cache_dir=tmp_path / "cache"))
    config = MistralConfig.from_pretrained(source)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (96, True)
    assert MistralForCausalLM.from_pretrained(source).lm_head.weight.shape == (300, 128)
    assert AutoTokenizer.from_pretrained(source).is_fast
