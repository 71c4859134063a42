"""A checkpoint that lacks weights is refused with their names; no whole one is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.checkpoint import check_checkpoint, load_whole
from tests.gpu_worker.families import EQUAL, save
from tests.soak import Scale
from tests.tiny import TinyFolders, change_json

Tensors = dict[str, Tensor]
Check = Callable[[str], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The native engine loads the model; the vLLM engine reads the headers, and leaves the loading to vLLM.
CHECKS: list[Check] = [load_whole, check_checkpoint]
SMALL_FAMILIES = 6


def copy_with(change: Callable[[Tensors], Tensors], source: Path, target: Path) -> Path:
    """Copy a model's folder and change its tensors."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / WEIGHTS)), target / WEIGHTS, metadata={"format": "pt"})
    return target


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def with_prefix(tensors: Tensors) -> Tensors:
    return {f"other.{name}": tensor for name, tensor in tensors.items()}


def with_a_shorter_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1].contiguous()}


def split(folder: Path) -> Path:
    """Divide the weights among two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    files = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, some in files.items() for name in some}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / WEIGHTS).unlink()
    return folder


@pytest.fixture
def llama(tiny_folders: TinyFolders) -> Path:
    return tiny_folders["llama"]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without("layers.1."),
            r"9 of the model's 30 tensors are missing \(model.layers.1.input_layernorm.weight, "
            r"model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight and 6 more\)\. Copy",
        ),
        (without("1.self_attn.q_proj"), r"1 of .* missing \(model.layers.1.self_attn.q_proj.weight\)"),
        (with_prefix, r"30 of .* missing .*; 30 tensors of the files are not the model's \(other.lm_head.weight, "),
        (
            with_a_shorter_head,
            r"1 of the model's 30 tensors have another shape \(lm_head.weight is \(299, 32\) and must be \(300, 32\)",
        ),
    ],
    ids=["layer", "one", "prefix", "shape"],
)
def test_missing_weights_are_refused_by_name(
    change: Callable[[Tensors], Tensors], said: str, check: Check, llama: Path, tmp_path: Path
) -> None:
    folder = copy_with(change, llama, tmp_path / "broken")
    with pytest.raises(BaseModelUnsupported, match=f"{re.escape(str(folder))} lacks weights: {said}"):
        check(str(folder))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("experts.2.gate_proj", r"cannot be converted .*experts\.gate_up_proj\)"),
        ("layers.1.mlp.experts.2.", r"layers.1.mlp.experts.down_proj is \(3, 32, 16\) and must be \(4, 32, 16\)"),
    ],
)
def test_an_expert_that_is_missing_in_part_is_named(part: str, said: str, check: Check, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", "qwen3_moe", EQUAL["qwen3_moe"])
    broken = copy_with(without(part), whole, tmp_path / "broken")
    with pytest.raises(BaseModelUnsupported, match=f"lacks weights: .*{said}"):
        check(str(broken))


@pytest.mark.parametrize("check", CHECKS)
def test_a_file_that_the_index_names_and_that_is_missing_is_named(check: Check, llama: Path, tmp_path: Path) -> None:
    folder = split(shutil.copytree(llama, tmp_path / "split"))
    check(str(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelUnsupported, match=r"names 2 files, and 1 of them is missing \(model-00002"):
        check(str(folder))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
def test_a_file_that_was_copied_in_part_is_named(file: str, check: Check, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "cut")
    if file != WEIGHTS:
        torch.save(load_file(folder / WEIGHTS), folder / file)
        (folder / WEIGHTS).unlink()
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(BaseModelUnsupported, match=rf"{file} cannot be read .* Copy the model's files again"):
        check(str(folder))


def test_a_folder_without_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "empty")
    (folder / WEIGHTS).unlink()
    with pytest.raises(BaseModelUnsupported, match=r"no file named model.safetensors"):
        load_whole(str(folder))


def test_every_supported_family_is_whole_in_its_headers(
    tmp_path: Path, tiny_folders: TinyFolders, scale: Scale
) -> None:
    for family, folder in tiny_folders.items():  # with ties and without
        assert check_checkpoint(str(folder)), family
    for name in list(EQUAL)[: scale.pick("families read", small=SMALL_FAMILIES, full=len(EQUAL))]:
        assert check_checkpoint(str(save(tmp_path / name, name, EQUAL[name]))), name


@pytest.mark.parametrize("check", CHECKS)
def test_biases_that_the_config_denies_are_refused_by_name(check: Check, llama: Path, tmp_path: Path) -> None:
    """They would be left out of all answers."""

    def with_bias(tensors: Tensors) -> Tensors:
        name = "model.layers.1.mlp.up_proj"
        return tensors | {f"{name}.bias": torch.ones(len(tensors[f"{name}.weight"]))}

    folder = copy_with(with_bias, llama, tmp_path / "biased")
    with pytest.raises(BaseModelUnsupported, match=r"has biases .* \(model.layers.1.mlp.up_proj.bias\)"):
        check(str(folder))


def test_tensors_beyond_the_model_are_ignored(llama: Path, tmp_path: Path) -> None:
    """A config may leave out layers of its files, such as those that predict several tokens."""
    folder = shutil.copytree(llama, tmp_path / "pruned")
    change_json(folder / "config.json", {"num_hidden_layers": 2})
    assert check_checkpoint(str(folder))
    assert load_whole(str(folder)).config.num_hidden_layers == 2


def test_the_weights_of_torchs_own_format_are_read(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "bin")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert check_checkpoint(str(folder))
    torch.save(without("layers.1.")(tensors), folder / "pytorch_model.bin")
    with pytest.raises(BaseModelUnsupported, match="9 of the model's 30 tensors are missing"):
        check_checkpoint(str(folder))


def packed(tensors: Tensors) -> Tensors:
    """Replace the weight of every linear layer by the tensors of a 4-bit format."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            found[name] = tensor
            continue
        module = name.removesuffix(".weight")
        found |= {f"{module}.{part}": torch.ones(4, 4, dtype=torch.int32) for part in ("qweight", "qzeros", "scales")}
    return found


def scaled(tensors: Tensors) -> Tensors:
    """Replace the weight of every linear layer by bytes of another shape, with a scale."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            found[name] = tensor.flatten()[:, None].to(torch.uint8)
            found[f"{name}_scale"] = torch.ones(1)
    return found


@pytest.mark.parametrize("change", [packed, scaled])
def test_quantised_modules_are_not_compared_but_all_others_are(
    change: Callable[[Tensors], Tensors], llama: Path, tmp_path: Path
) -> None:
    whole = copy_with(change, llama, tmp_path / "whole")
    change_json(whole / "config.json", {"quantization_config": {"quant_method": "gptq"}})
    assert check_checkpoint(str(whole))
    broken = copy_with(without("1.self_attn.q_proj"), whole, tmp_path / "broken")
    with pytest.raises(
        BaseModelUnsupported, match=r"1 of .* missing \(model.layers.1.self_attn.q_proj.weight\)\. Copy"
    ):
        check_checkpoint(str(broken))
    broken = copy_with(with_a_shorter_head, whole, tmp_path / "shorter")
    with pytest.raises(BaseModelUnsupported, match=r"lm_head.weight is"):
        check_checkpoint(str(broken))


def test_a_conversion_that_only_a_quantised_model_fails_is_left_to_vllm(tmp_path: Path) -> None:
    """transformers' conversions are those of the whole model's tensors."""
    whole = save(tmp_path / "whole", "qwen3_moe", EQUAL["qwen3_moe"])
    folder = copy_with(without("experts.2.gate_proj"), whole, tmp_path / "quantised")
    change_json(folder / "config.json", {"quantization_config": {"quant_method": "gptq"}})
    assert not check_checkpoint(str(folder))


def test_files_of_mistrals_own_tools_do_not_spare_the_others_the_check(llama: Path, tmp_path: Path) -> None:
    broken = split(copy_with(without("layers.1."), llama, tmp_path / "broken"))
    (broken / "consolidated.safetensors").touch()
    with pytest.raises(BaseModelUnsupported, match="lacks weights: 9 of the model's 30 tensors are missing"):
        check_checkpoint(str(broken))


def test_files_of_mistrals_own_tools_are_refused_where_vllm_would_read_both(llama: Path, tmp_path: Path) -> None:
    folder = copy_with(dict, llama, tmp_path / "model")
    (folder / "consolidated.safetensors").touch()
    with pytest.raises(BaseModelUnsupported, match=r"would read .*/consolidated.safetensors over model.safetensors"):
        check_checkpoint(str(folder))
    assert check_checkpoint(str(split(folder))), "vLLM reads the files of an index only"


def test_a_model_of_the_hub_is_checked_once_its_files_are_here(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    copy_with(without("layers.1."), llama, snapshot)
    weights = (snapshot / WEIGHTS).read_bytes()
    (snapshot / WEIGHTS).unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not check_checkpoint("org/tiny")
    (snapshot / WEIGHTS).write_bytes(weights)
    with pytest.raises(BaseModelUnsupported, match="org/tiny lacks weights: 9 of the model's 30 tensors are missing"):
        check_checkpoint("org/tiny")


def test_loaded_weights_are_those_of_the_files(llama: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    found = load_whole(str(llama), dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_class_that_reads_more_files_than_weights_is_compared_without_them(
    tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen2.5-Omni does, which reads voices."""

    def from_pretrained(_: type, path: str | None, **__: object) -> None:
        raise OSError(f"{path} has no voices")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    assert check_checkpoint(str(tiny_folders["llama"]))
