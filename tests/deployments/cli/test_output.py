from __future__ import annotations

from pathlib import Path

import pytest

from deployments.cli.output import behind_note, counted, describe_problem


def test_one_of_a_noun_is_singular() -> None:
    assert [counted(number, "sample") for number in (0, 1, 2)] == ["0 samples", "1 sample", "2 samples"]
    assert behind_note(1) == "1 replica is not up to date yet"
    assert behind_note(2) == "2 replicas are not up to date yet"


def test_a_problem_of_a_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError) as missing:
        (tmp_path / "nofile").read_text()
    assert describe_problem(missing.value) == f"{tmp_path / 'nofile'}: no such file"
    with pytest.raises(OSError) as folder:
        tmp_path.read_text()
    assert describe_problem(folder.value) == f"{tmp_path}: Is a directory"
    assert describe_problem(ValueError("line 3: bad")) == "line 3: bad"
