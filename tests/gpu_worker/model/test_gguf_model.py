from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.gguf_model import find_gguf, find_integers, gguf_folder


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_the_integers_of_a_gguf_tensor_are_found_again(kind: str) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    weight[2, 32:64] = 0
    type_ = gguf.GGMLQuantizationType[kind]
    whole = gguf.quants.dequantize(gguf.quants.quantize(weight, type_), type_)
    found = find_integers(torch.from_numpy(whole), kind)
    assert found is not None and found.bits == int(kind[1])
    assert torch.equal(found.dequantized(), torch.from_numpy(whole))
    assert torch.equal(found.scales.half().float(), found.scales), "a scale of the file is a half"


def test_a_group_without_the_largest_integer_is_found_too() -> None:
    weight = torch.randint(-50, 50, (4, 64)).float() * 0.125
    weight[0, 0] = 127 * 0.125
    found = find_integers(weight, "Q8_0")
    assert found is not None and torch.equal(found.dequantized(), weight)


def test_a_weight_that_is_no_product_of_integers_is_not_taken() -> None:
    assert find_integers(torch.randn(4, 64), "Q8_0") is None
    assert find_integers(torch.randn(4, 48), "Q8_0") is None


def gguf_with(path: Path, kind: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    type_ = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("output.weight", gguf.quants.quantize(np.ones((4, 256), np.float32), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_types_of_tensors_are_refused_by_name(tmp_path: Path) -> None:
    file = gguf_with(tmp_path / "model.gguf", "Q5_0")
    with pytest.raises(
        BaseModelUnsupported, match="has tensors of type Q5_0; the native engine reads GGUF files of Q8_0"
    ):
        gguf_folder(file, tmp_path / "cache")


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseModelUnsupported, match="cannot be read as a GGUF file"):
        gguf_folder(tmp_path / "model.gguf", tmp_path / "cache")


def test_one_file_of_a_folder_is_found_and_two_are_refused(tmp_path: Path) -> None:
    assert find_gguf(str(tmp_path)) is None and find_gguf("google/gemma-3-270m") is None
    (tmp_path / "a.gguf").touch()
    assert find_gguf(str(tmp_path)) == tmp_path / "a.gguf" == find_gguf(str(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(BaseModelUnsupported, match=r"has 2 GGUF files \(a.gguf, b.gguf\): name one"):
        find_gguf(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert find_gguf(str(tmp_path)) is None
