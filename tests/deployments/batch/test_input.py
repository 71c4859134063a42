from __future__ import annotations

import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deployments.batch.input import BatchInput, PartReader, scan
from deployments.batch.output import BatchOutput, Manifest
from deployments.errors import BatchRefused
from lora_store import Location
from tests.s3 import S3Endpoint


def numbers(path: Path, first: int, count: int, *, group_rows: int = 7) -> Path:
    table = pa.table({"prompt": pa.array([f"row {n}" for n in range(first, first + count)], pa.string())})
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def read(reader: PartReader, start: int, stop: int) -> list[str]:
    found: list[str] = reader.read(start, stop)["prompt"].to_pylist()
    return found


@pytest.fixture
def source(tmp_path: Path) -> BatchInput:
    """35 rows: files of 20, 0 and 15, and files that do not belong to the input."""
    folder = tmp_path / "in"
    folder.mkdir()
    numbers(folder / "b.parquet", 20, 15, group_rows=4)
    numbers(folder / "a.parquet", 0, 20)
    numbers(folder / "a2.parquet", 0, 0)
    (folder / "_notes.parquet").write_text("no parquet")
    (folder / "readme.txt").write_text("neither")
    return scan(str(folder))


def test_a_folder_is_read_as_its_files_in_order(source: BatchInput) -> None:
    assert [Path(file.path).name for file in source.files] == ["a.parquet", "a2.parquet", "b.parquet"]
    assert source.num_rows == 35


@pytest.mark.parametrize("size", [1, 3, 7, 10, 35])
@pytest.mark.parametrize("order", ["forward", "backward", "every other"])
def test_parts_of_any_size_and_order_have_the_right_rows(source: BatchInput, size: int, order: str) -> None:
    starts = list(range(0, 35, size))
    asked = {"forward": starts, "backward": starts[::-1], "every other": starts[::2] + starts[1::2]}[order]
    reader = PartReader(source)
    for start in asked:
        stop = min(start + size, 35)
        assert read(reader, start, stop) == [f"row {n}" for n in range(start, stop)]


def test_row_groups_outside_a_part_are_not_read(tmp_path: Path) -> None:
    path = numbers(tmp_path / "in.parquet", 0, 40, group_rows=10)
    source = scan(str(path))
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    begin = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset)
    data = bytearray(path.read_bytes())
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    reader = PartReader(source)
    assert read(reader, 25, 31) == [f"row {n}" for n in range(25, 31)]
    with pytest.raises(OSError, match=r"\S"):
        read(PartReader(source), 10, 12)


def test_a_row_group_is_read_a_thousand_rows_at_a_time(tmp_path: Path) -> None:
    path = numbers(tmp_path / "in.parquet", 0, 5000, group_rows=5000)
    reader = PartReader(scan(str(path)))
    assert read(reader, 4100, 4103) == ["row 4100", "row 4101", "row 4102"]
    assert reader.read(4999, 5000).nbytes < 1000


def test_a_changed_byte_makes_another_input(tmp_path: Path) -> None:
    path = numbers(tmp_path / "in.parquet", 0, 5)
    before = scan(str(path)).files[0].sha256
    assert scan(str(path)).files[0].sha256 == before
    numbers(path, 1, 5)
    assert scan(str(path)).files[0].sha256 != before


def test_a_folder_may_have_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    for number in range(40):
        numbers(tmp_path / f"{number:02}.parquet", number, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    for descriptor in room:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(room) + 1, hard))
    try:
        assert scan(str(tmp_path)).num_rows == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_invalid_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BatchRefused, match="no parquet file at"):
        scan(str(tmp_path / "absent"))
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(BatchRefused, match="cannot be read"):
        scan(str(tmp_path / "text.parquet"))
    with pytest.raises(BatchRefused, match="ftp"):
        scan("ftp://host/in.parquet")
    folder = tmp_path / "mixed"
    folder.mkdir()
    numbers(folder / "a.parquet", 0, 2)
    pq.write_table(pa.table({"prompt": [1]}), folder / "b.parquet")
    with pytest.raises(BatchRefused, match=r"b.parquet has other columns than .*a.parquet"):
        scan(str(folder))


def test_input_and_output_may_be_on_s3(s3_endpoint: S3Endpoint) -> None:
    files, root = Location(s3_endpoint.uri("batch-in")).filesystem()
    pq.write_table(pa.table({"prompt": ["a", "b"]}), f"{root}/one.parquet", filesystem=files)
    pq.write_table(pa.table({"prompt": ["c"]}), f"{root}/two.parquet", filesystem=files)
    source = scan(s3_endpoint.uri("batch-in"))
    assert read(PartReader(source), 1, 3) == ["b", "c"]
    output = BatchOutput(s3_endpoint.uri("batch-out"))
    manifest = Manifest(generation=1, input={}, settings={})
    assert output.begin(manifest) == BatchOutput(s3_endpoint.uri("batch-out")).begin(manifest)
    output.write(3, PartReader(source).read(0, 2))
    assert output.done() == {3}
