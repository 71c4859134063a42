from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from deployments.batch.output import BatchOutput, Manifest
from deployments.errors import BatchRefused


def manifest(generation: int = 3, **changes: Any) -> Manifest:
    settings = {"template": "alpaca", "retrieval": {"k": 3, "weights": "softmax"}, "part_rows": 4} | changes
    began_at = datetime(2026, 11, generation, tzinfo=UTC)
    return Manifest(generation=generation, input={"in.parquet": "abc"}, settings=settings, run="one", began_at=began_at)


def test_a_continued_run_keeps_the_generation_and_the_time_it_began_with(tmp_path: Path) -> None:
    assert BatchOutput(str(tmp_path)).begin(manifest(3)).generation == 3
    assert BatchOutput(str(tmp_path)).begin(manifest(9)) == manifest(3)


def test_a_run_of_an_earlier_version_gets_one_time_for_all_its_continuations(tmp_path: Path) -> None:
    earlier = manifest().model_dump_json(exclude={"began_at"})
    tmp_path.joinpath("_manifest.json").write_text(earlier)
    continued = BatchOutput(str(tmp_path)).begin(manifest())
    assert BatchOutput(str(tmp_path)).begin(manifest()).began_at == continued.began_at


def test_existing_parts_are_found_and_form_one_dataset(tmp_path: Path) -> None:
    output = BatchOutput(str(tmp_path / "out"))
    output.begin(manifest())
    assert output.done() == set()
    output.write(2, pa.table({"n": [3, 4]}))
    output.write(0, pa.table({"n": [1, 2]}))
    assert output.done() == {0, 2}
    assert ds.dataset(tmp_path / "out").to_table()["n"].to_pylist() == [1, 2, 3, 4]


def test_a_partly_written_file_is_ignored_and_replaced(tmp_path: Path) -> None:
    output = BatchOutput(str(tmp_path))
    output.begin(manifest())
    half = tmp_path / ".part-000001.parquet.0123"
    half.write_bytes(b"half")
    assert output.done() == set()
    output.begin(manifest())
    assert not half.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            manifest(retrieval={"k": 5, "weights": "softmax"}, part_rows=8),
            "OUT was started with other settings: retrieval.k was 3, is 5; part_rows was 4, is 8",
        ),
        (manifest(sampling_defaults={}, part_rows=8), "OUT was started with other settings: part_rows was 4, is 8"),
        (
            manifest().model_copy(update={"input": {"in.parquet": "abd"}}),
            "the input differs from that of the run in OUT: in.parquet was 'abc', is 'abd'",
        ),
    ],
)
def test_another_input_and_other_settings_are_refused_by_name(tmp_path: Path, given: Manifest, says: str) -> None:
    output = BatchOutput(str(tmp_path))
    output.begin(manifest())
    with pytest.raises(BatchRefused) as caught:
        output.begin(given)
    assert str(caught.value).replace(str(tmp_path), "OUT") == says
    assert output.begin(manifest()) == manifest()
    assert output.begin(manifest(sampling_defaults={})) == manifest(), "of an earlier version with fewer settings"


def test_a_folder_with_other_files_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BatchRefused, match="no resumable run"):
        BatchOutput(str(tmp_path)).begin(manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    (tmp_path / "_manifest.json").write_text('{"version": 2}')
    with pytest.raises(BatchRefused, match="not a manifest of this version"):
        BatchOutput(str(tmp_path)).begin(manifest())
