from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_store.bounded_files import Limits, read_bytes, read_tensors
from lora_store.errors import FileRefused


@pytest.mark.parametrize(
    ("size", "limit", "shown"),
    [(10, 9, "10 bytes; this server takes 9 bytes$"), (1025, 1024, "1,025 bytes; this server takes 1,024 bytes$")],
)
def test_a_file_is_read_up_to_its_limit_and_refused_above(tmp_path: Path, size: int, limit: int, shown: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * size)
    assert read_bytes(file, size) == b"x" * size
    with pytest.raises(FileRefused, match=f"file: has {shown}"):
        read_bytes(file, limit)


def large_file(folder: Path) -> tuple[Path, torch.Tensor]:
    """Write a tensor that is mapped rather than read, and return both."""
    tensor = torch.randn(5 << 10, 1 << 10, generator=torch.Generator().manual_seed(1))
    save_file({"a": tensor}, folder / "large.safetensors")
    return folder / "large.safetensors", tensor


@pytest.mark.parametrize("is_private", [True, False])
@pytest.mark.parametrize("padding", [0, 3], ids=["aligned", "unaligned"])
def test_large_tensors_are_mapped_with_the_values_of_the_file(tmp_path: Path, is_private: bool, padding: int) -> None:
    file, tensor = large_file(tmp_path)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = (size + padding).to_bytes(8, "little") + data[8 : 8 + size] + b" " * padding
    file.write_bytes(header + data[8 + size :])
    found = read_tensors(file, Limits(), is_private=is_private)["a"]
    assert torch.equal(found.tensor(), tensor)


def test_a_change_of_a_file_that_is_not_private_does_not_reach_what_was_read(tmp_path: Path) -> None:
    file, tensor = large_file(tmp_path)
    found = read_tensors(file, Limits())["a"]
    with file.open("r+b") as changed:
        changed.truncate(100)
    assert torch.equal(found.tensor(), tensor)


def test_a_limit_on_the_weights_names_its_setting(tmp_path: Path) -> None:
    file, _ = large_file(tmp_path)
    with pytest.raises(FileRefused, match=r"this server takes 1,048,576 bytes \(admission\.max_weights_bytes\)"):
        read_tensors(file, Limits(max_weights_bytes=1 << 20))
