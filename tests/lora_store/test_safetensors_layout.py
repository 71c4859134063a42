"""The copy-free safetensors code, compared with the safetensors library."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lora_store.safetensors_layout import PREFIX_BYTES, StoredTensor, make_pieces, tensors_in

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _random_tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    found = {}
    for number in range(draw.randrange(1, 12)):
        shape = [draw.randrange(0, 7) for _ in range(draw.randrange(1, 4))]
        name = "".join(draw.choice("abcXYZ._-019") for _ in range(draw.randrange(1, 9)))
        found[f"{name}{number}"] = torch.randn(shape).to(draw.choice(DTYPES))
    return found


def _stored(data: bytes) -> dict[str, StoredTensor]:
    start = PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES], "little")
    entries = json.loads(data[PREFIX_BYTES:start])
    entries.pop("__metadata__", None)
    rest = np.frombuffer(bytearray(data[start:]) or bytearray(1), np.uint8)[: len(data) - start]
    return tensors_in(entries, rest)


def _read(data: bytes) -> dict[str, torch.Tensor]:
    return {name: stored.tensor() for name, stored in _stored(data).items()}


@pytest.mark.parametrize("seed", range(10))
def test_pieces_equal_the_librarys_bytes_and_are_read_alike(seed: int) -> None:
    tensors, metadata = _random_tensors(seed), {"lora": json.dumps({"scaling": {"a.b": 0.5 + seed, "c": 2e-30}})}
    data = b"".join(make_pieces(tensors, metadata))
    assert data == save(tensors, metadata=metadata)
    assert b"".join(make_pieces(_stored(data), metadata)) == data, "without torch"
    wanted, found = load(data), _read(data)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_a_tensor_that_is_not_contiguous_is_written_contiguously() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert b"".join(make_pieces({"x": tensor}, {"m": "v"})) == save({"x": tensor.contiguous()}, metadata={"m": "v"})


def _file(entries: object, num_bytes: int) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(PREFIX_BYTES, "little") + header + bytes(num_bytes)


def _entry(dtype: str, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "gap": ({"a": _entry("F32", [1], 0, 4), "b": _entry("F32", [1], 8, 12)}, 12),
    "overlap": ({"a": _entry("F32", [2], 0, 8), "b": _entry("F32", [1], 4, 8)}, 8),
    "left over": ({"a": _entry("F32", [1], 0, 4)}, 8),
    "cut off": ({"a": _entry("F32", [2], 0, 8)}, 4),
    "too few for the shape": ({"a": _entry("F32", [3], 0, 8)}, 8),
    "huge shape": ({"a": _entry("F32", [2**40, 2**40], 0, 8)}, 8),
    "negative": ({"a": _entry("F32", [-1, -1], 0, 4)}, 4),
    "begins below zero": ({"a": _entry("F32", [1], -4, 0)}, 4),
    "ends before it begins": ({"a": _entry("F32", [1], 4, 0)}, 4),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "offsets of text": ({"a": _entry("F32", [1], "0", "4")}, 4),
    "a fraction": ({"a": _entry("F32", [1.0], 0, 4)}, 4),
    "no entry": ({"a": [0, 4]}, 4),
    "unknown dtype": ({"a": _entry("F3", [1], 0, 4)}, 4),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_the_library_refuses_are_refused(case: str) -> None:
    data = _file(*BROKEN[case])
    with pytest.raises(SafetensorError):
        load(data)
    with pytest.raises(ValueError, match=r"tensor|holds"):
        _read(data)


def test_a_shape_of_many_sizes_is_refused_before_they_are_multiplied() -> None:
    assert _read(_file({"a": _entry("F32", [1] * 8, 0, 4)}, 4))["a"].shape == (1,) * 8
    for sizes in ([1] * 9, [2**63 - 1] * 50_000):
        with pytest.raises(ValueError, match="'a' has no valid dtype and shape"):
            _read(_file({"a": _entry("F32", sizes, 0, 4)}, 4))


def test_unaligned_numbers_are_read() -> None:
    data = _file({"a": _entry("F16", [1], 0, 2), "b": _entry("F32", [1], 2, 6)}, 6)
    found = _read(data[:-4] + torch.tensor([2.5]).numpy().tobytes())
    assert (found["a"].tolist(), found["b"].tolist()) == ([0.0], [2.5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_and_the_largest_finite_one_equal_torchs(dtype: torch.dtype) -> None:
    numbers = torch.cat([torch.randn(1000).to(dtype), torch.tensor([torch.finfo(dtype).max, torch.inf, torch.nan])])
    data = b"".join(make_pieces({"x": numbers.to(dtype)}, {"m": "v"}))
    start = PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES], "little")
    entries = json.loads(data[PREFIX_BYTES:start])
    stored = tensors_in({"x": entries["x"]}, np.frombuffer(bytearray(data[start:]), np.uint8))["x"]
    found = np.concatenate(list(stored.numbers()))
    assert np.array_equal(found, numbers.to(dtype).double().numpy(), equal_nan=True)
    assert stored.largest_finite == torch.finfo(dtype).max


def test_a_large_tensor_is_read_in_parts() -> None:
    numbers = np.arange((1 << 20) + 5, dtype="<f4")
    [first, rest] = StoredTensor("F32", (len(numbers),), numbers.view(np.uint8)).numbers()
    assert len(rest) == 5 and np.array_equal(np.concatenate([first, rest]), numbers)
