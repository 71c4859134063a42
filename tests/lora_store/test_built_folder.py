from __future__ import annotations

from pathlib import Path

import pytest

from lora_store import built_folder
from lora_store.built_folder import build_folder


def test_a_folder_appears_whole_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("first", "second"):
        with build_folder(folder) as target:
            (target / text).write_text(text)
            assert not (folder / text).exists()
        assert [path.name for path in folder.iterdir()] == [text]
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with build_folder(folder) as target:
        (target / "kept").touch()
    with pytest.raises(ValueError, match="stop"), build_folder(folder) as target:
        (target / "half").touch()
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == [folder] and [path.name for path in folder.iterdir()] == ["kept"]


def test_what_a_killed_process_left_goes_and_other_folders_stay(tmp_path: Path) -> None:
    left, others = (
        tmp_path / ".model-a1_b2c3d",
        [tmp_path / name for name in (".model-2-a1_b2c3d", ".model.lock", "model-x")],
    )
    for path in (left, *others):
        path.mkdir()
    with build_folder(tmp_path / "model"):
        pass
    assert not left.exists() and all(path.exists() for path in others)


def test_everything_is_on_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, flushed = tmp_path / "model", list[tuple[str, bool]]()
    monkeypatch.setattr(built_folder, "flush_to_disk", lambda path: flushed.append((path.name, folder.exists())))
    with build_folder(folder) as target:
        (target / "part").mkdir()
        (target / "part" / "weights").touch()
    assert sorted(flushed[:-1]) == [("built", False), ("part", False), ("weights", False)]
    assert flushed[-1] == (tmp_path.name, True)
