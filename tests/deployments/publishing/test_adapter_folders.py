from __future__ import annotations

from pathlib import Path

import pytest

from deployments.publishing.adapter_folders import (
    ADAPTER_FILES,
    AdapterFolder,
    adapter_files,
    adapter_folders,
    folder_bytes,
    linked_files,
)
from lora_store.contract_files import CONTRACT_FILE, INTRINSIC_FILE
from lora_store.peft_config import CONFIG_FILE
from lora_store.peft_files import MLX_WEIGHTS_FILE, PICKLE_FILE, TEMPLATE_FILE, WEIGHTS_FILE
from lora_store.sample_files import DESCRIPTION_FILE, SAMPLES_FILE
from lora_store.validation import Label
from tests.locked import lock


def test_the_adapters_files_are_those_that_validation_reads(tmp_path: Path) -> None:
    assert ADAPTER_FILES == (
        CONFIG_FILE,
        WEIGHTS_FILE,
        MLX_WEIGHTS_FILE,
        SAMPLES_FILE,
        DESCRIPTION_FILE,
        TEMPLATE_FILE,
        CONTRACT_FILE,
        INTRINSIC_FILE,
        PICKLE_FILE,
    )
    for name in (WEIGHTS_FILE, CONFIG_FILE, "optimizer.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in adapter_files(tmp_path)] == [CONFIG_FILE, WEIGHTS_FILE]


def test_an_adapter_is_its_own_folder_and_a_folder_of_them_is_sorted(tmp_path: Path) -> None:
    for name in ("c", "a", "d", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert adapter_folders(tmp_path) == [AdapterFolder(tmp_path / name, name) for name in "abcd"]
    assert adapter_folders(tmp_path / "a") == [AdapterFolder(tmp_path / "a", "a")]
    assert adapter_folders(tmp_path / "empty") == []


def test_a_folder_that_may_not_be_entered_is_left_out_unless_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("lost+found", "poet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).touch()
    lock(tmp_path / "lost+found", monkeypatch)
    assert [found.name for found in adapter_folders(tmp_path)] == ["poet"]
    assert f"{tmp_path}/lost+found" in caplog.text
    assert folder_bytes(tmp_path / "lost+found") == 0
    with pytest.raises(PermissionError):
        adapter_folders(tmp_path / "lost+found")


def test_the_last_checkpoint_stands_for_a_training_run(tmp_path: Path) -> None:
    for name in ("run/checkpoint-9", "run/checkpoint-100", "run/checkpoint-x", "done/checkpoint-1", "done"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / CONFIG_FILE).touch()
    (tmp_path / "run" / "checkpoint-200").mkdir()  # interrupted while it was written
    last = AdapterFolder(tmp_path / "run" / "checkpoint-100", "run")
    assert adapter_folders(tmp_path / "run") == [last]
    assert adapter_folders(tmp_path) == [AdapterFolder(tmp_path / "done", "done"), last]
    assert adapter_folders(tmp_path / "run" / "checkpoint-9") == [
        AdapterFolder(tmp_path / "run" / "checkpoint-9", "run")
    ]


def test_a_folder_whose_name_is_none_gets_the_nearest_one(tmp_path: Path) -> None:
    names = {"my run - (v2)": "my-run-v2", "émotion FR": "emotion-FR", "-x": "-x", "x" * 70: "x" * 64, "日本": "日本"}
    for name in (*names, "a b", "a-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).touch()
    found = {adapter.path.name: adapter.name for adapter in adapter_folders(tmp_path)}
    assert found == {**names, "a b": "a b", "a-b": "a-b"}  # two would be called a-b
    for name, nearest in names.items():
        said = [f"{problem}." for problem in Label(name).problems() if name != nearest]
        assert all(f"such as {nearest!r}." in problem for problem in said)  # what a refusal proposes


def test_links_are_listed_and_count_with_their_own_size(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b"12345")
    (tmp_path / "elsewhere").write_bytes(b"x" * 1000)
    (tmp_path / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "optimizer.pt").symlink_to(tmp_path / "elsewhere")  # not one of an adapter's files
    assert linked_files(tmp_path) == [tmp_path / WEIGHTS_FILE]
    assert folder_bytes(tmp_path) == 5 + (tmp_path / WEIGHTS_FILE).lstat().st_size < 1000
