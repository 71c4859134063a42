"""A model that agreed with transformers is compared again only if something changed that the result depends on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_worker.config import NativeWorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.native import loop
from gpu_worker.native.checks import passed_check
from gpu_worker.native.checks.model_check import ModelCheck
from gpu_worker.native.checks.passed_check import PassedCheck
from tests.gpu_worker.engine_driver import fetching
from tests.tiny import InlineExecutor, tiny_config


@pytest.fixture
def model(tiny_folders: Mapping[str, Path], tmp_path: Path) -> Path:
    """A saved model of the test's own."""
    return shutil.copytree(tiny_folders["gemma3"], tmp_path / "model")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as code of the server."""
    (tmp_path / "package").mkdir()
    source = tmp_path / "package/plan.py"
    source.write_text("ONE = 1\n")
    monkeypatch.setattr(passed_check, "lora_store", SimpleNamespace(__path__=[str(source.parent)]))
    return source


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder with the compiled kernels of the user's own."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/native").symlink_to(NativeWorkerConfig().cache_dir / "native")
    return tmp_path / "cache"


@pytest.fixture
def compares(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Return a function that starts an engine and returns whether it compared itself with transformers."""
    runs: list[ModelCheck] = []
    run = ModelCheck.run

    def counted(self: ModelCheck, *parts: object) -> None:
        runs.append(self)
        run(self, *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.ModelCheck, "run", counted)

    def start(**changes: object) -> bool:
        runs.clear()
        executor = InlineExecutor()
        config = tiny_config(model, cache_dir=cache, **changes)
        loop.Engine(config, fetching({}.__getitem__, executor), executor=executor)
        return len(runs) == 1

    return start


def test_a_later_start_compares_again_only_after_a_change(
    compares: Callable[..., bool], model: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compares() and not compares()
    assert compares(max_model_len=128) and not compares(max_model_len=128), "another setting"
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert compares() and not compares(), "other weights"
    code.write_text("ONE = 1.0\n")
    assert compares() and not compares(), "other code"
    monkeypatch.setattr(passed_check, "version", lambda package: "1.0")
    assert compares() and not compares(), "other packages"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert compares() and not compares(), "other instructions"


def test_a_model_that_differs_is_compared_at_every_start(
    compares: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ModelCheck) -> None:
        raise BaseModelUnsupported("differs")

    with monkeypatch.context() as patched:
        patched.setattr(ModelCheck, "_judge", refuse)
        for _ in range(2):
            with pytest.raises(BaseModelUnsupported, match="differs"):
                compares()
    assert compares() and not compares()


def test_notes_are_bounded_and_a_folder_that_cannot_be_written_is_ignored(tmp_path: Path, model: Path) -> None:
    config = tiny_config(model, cache_dir=tmp_path)
    for number in range(70):
        PassedCheck(tmp_path / "passed_checks", str(number)).note()
    assert len(list((tmp_path / "passed_checks").iterdir())) == 64
    assert PassedCheck(tmp_path / "passed_checks", "69").is_noted
    shutil.rmtree(tmp_path / "passed_checks")
    (tmp_path / "passed_checks").write_text("no folder")
    found = PassedCheck.of(config, str(model))
    assert found is not None
    found.note()
    assert not found.is_noted


def test_a_model_without_a_folder_is_always_compared(model: Path) -> None:
    assert PassedCheck.of(tiny_config(model), "organisation/model") is None
