"""Scripts that share a results file do not erase each other's numbers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results_file
from benchmarks.results_file import TreeChanged, vendor_of, write_part, write_results

REAL_COMMIT = results_file.commit


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(results_file, "commit", lambda: "0123456789ab")
    return tmp_path


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name / "results.json").read_text())
    return content


def test_a_file_of_one_script_is_replaced(folder: Path) -> None:
    write_results("one", figures={"a": 1, "b": 2}, table="old", runs=[])
    write_results("one", figures={"a": 3}, table="new\n\n", runs=[{"x": 4}])
    content = read(folder, "one")
    assert (content["figures"], content["runs"]) == ({"a": 3}, [{"x": 4}])
    assert content.keys() == {"machine", "commit", "command", "date", "figures", "runs"}
    assert (folder / "one" / "table.txt").read_text() == "new\n"


def test_results_of_a_changed_tree_are_refused_and_kept_next_to_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results("one", figures={"a": 1}, table="of a commit", runs=[])
    monkeypatch.setattr(results_file, "commit", lambda: "0123456789ab+")
    for write in (
        lambda: write_results("one", figures={"a": 2}, table="of none", runs=[]),
        lambda: write_part("all", "first", figures={"a": 2}, table="of none", runs=[]),
    ):
        with pytest.raises(TreeChanged, match="local changes"):
            write()
    assert read(folder, "one")["figures"] == {"a": 1}
    assert (folder / "one" / "table.txt").read_text() == "of a commit\n"
    assert json.loads((folder / "one" / "results.unclean.json").read_text())["figures"] == {"a": 2}
    assert not (folder / "all" / "results.json").exists()


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


def test_results_of_another_vendors_processor_stay_where_they_are_to_be_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = {"amd": "AMD EPYC 9B14, 2 cores", "intel": "Intel(R) Xeon(R) Processor, 2 cores", "aarch": "aarch64, 4"}
    for number, (vendor, machine) in enumerate(machines.items()):
        assert vendor_of(machine) == vendor
        monkeypatch.setattr(results_file, "machine", lambda machine=machine: machine)
        for figure in (number + 10, number):  # the second replaces the first
            table = f"table {figure}"
            write_results("one", figures={"a": figure}, table=table, runs=[], keeps_other_vendors=True)
    for number, suffix in enumerate(("", ".intel", ".aarch")):
        content = json.loads((folder / "one" / f"results{suffix}.json").read_text())
        assert (content["figures"], content["machine"]) == ({"a": number}, list(machines.values())[number])
        assert (folder / "one" / f"table{suffix}.txt").read_text() == f"table {number}\n"
    assert len(list((folder / "one").iterdir())) == 6
    write_results("one", figures={"a": 5}, table="", runs=[])  # of the last machine, without the option
    assert read(folder, "one")["figures"] == {"a": 5}


def test_parts_of_a_file_stay_when_another_is_written(folder: Path) -> None:
    write_part("all", "second", figures={"b": 1, "c": 2}, table="two", runs=[{"x": 1}])
    write_part("all", "first", figures={"a": 3}, table="one\n", runs=[])
    write_part("all", "second", figures={"b": 4}, table="two again\nof two lines", runs=[{"x": 5}])
    content = read(folder, "all")
    assert content["figures"] == {"a": 3, "b": 4}
    assert [(run["part"], run["figures"], run["rows"]) for run in content["runs"]] == [
        ("first", {"a": 3}, []),
        ("second", {"b": 4}, [{"x": 5}]),
    ]
    assert {"machine", "commit", "command", "date"} <= content["runs"][0].keys() & content.keys()
    assert (folder / "all" / "table.txt").read_text() == "one\n\ntwo again\nof two lines\n"


def test_a_number_belongs_to_one_part(folder: Path) -> None:
    write_part("all", "first", figures={"a": 3}, table="", runs=[])
    with pytest.raises(ValueError, match="second and another part of all both write a"):
        write_part("all", "second", figures={"a": 4}, table="", runs=[])
    assert read(folder, "all")["figures"] == {"a": 3}


def test_the_command_names_no_folder_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--python", str(folder / "venv" / "python"), "--rounds", "10", "a/b"])
    write_results("one", figures={}, table="", runs=[])
    assert read(folder, "one")["command"].endswith(" --python python --rounds 10 a/b")
