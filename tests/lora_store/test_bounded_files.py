from __future__ import annotations

from pathlib import Path

import pytest

from lora_store.bounded_files import parse_json_object, read_bytes
from lora_store.errors import FileRefused


def test_a_file_is_read_up_to_its_limit_and_refused_above(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert read_bytes(file, 10) == b"x" * 10
    with pytest.raises(FileRefused, match=r"file: has 10 bytes, at most 9 bytes$"):
        read_bytes(file, 9)


def test_large_sizes_are_also_given_in_mib(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * (3 << 20))
    with pytest.raises(FileRefused, match=r"has 3145728 bytes \(3 MiB\), at most 2097152 bytes \(2 MiB\)$"):
        read_bytes(file, 2 << 20)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 100_000, "it nests too deep"),
        (b"[1]", "it must be a JSON object, got list"),
        (b'{"a": 1, "a": 2}', "it repeats the keys"),
    ],
)
def test_ambiguous_json_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json_object(data)
