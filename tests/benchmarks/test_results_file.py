"""Results of a tree that no commit names are refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import results_file
from benchmarks.results_file import TreeChanged, processor_of, write_part, write_results

REAL_COMMIT = results_file.commit


def test_results_of_a_changed_tree_are_refused_and_kept_next_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    write_results("one", figures={"a": 1}, table="of a commit", runs=[])
    monkeypatch.setattr(results_file, "commit", lambda: "0123456789ab+")
    with pytest.raises(TreeChanged, match="local changes"):
        write_results("one", figures={"a": 2}, table="of none", runs=[])
    with pytest.raises(TreeChanged, match="local changes"):
        write_part("all", "first", figures={"a": 2}, table="of none", runs=[])
    for study in ("one", "all"):
        assert json.loads((tmp_path / study / "results.unclean.json").read_text())["figures"] == {"a": 2}
    assert json.loads((tmp_path / "one" / "results.json").read_text())["figures"] == {"a": 1}
    assert (tmp_path / "one" / "table.txt").read_text() == "of a commit\n"
    assert not (tmp_path / "all" / "results.json").exists()


def test_a_tree_is_changed_by_tracked_files_other_than_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, check=True)

    module = tmp_path / "benchmarks" / "results_file.py"
    result = tmp_path / "benchmarks" / "results" / "one.json"
    result.parent.mkdir(parents=True)
    for path in (module, result):
        path.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    monkeypatch.setattr(results_file, "__file__", str(module))
    result.write_text("2")
    (tmp_path / "new").write_text("3")
    assert not REAL_COMMIT().endswith("+")
    module.write_text("2")
    assert REAL_COMMIT().endswith("+")


@pytest.mark.parametrize(("capability", "kind"), [("AVX512", "amd"), ("AVX2", "amd-avx2")])
def test_processors_with_and_without_long_vectors_are_of_two_kinds(capability: str, kind: str) -> None:
    assert processor_of(f"AMD EPYC, 2 cores, 24 GiB, {capability}, torch 2.13.0+cpu") == kind
