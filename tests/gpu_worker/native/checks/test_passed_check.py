"""A model that agreed with transformers is compared again only if something changed that the result depends on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpu_worker.config import NativeWorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.quantization import QuantizedWeight
from gpu_worker.native import compiled_layer, fused, loop
from gpu_worker.native.checks import passed_check
from gpu_worker.native.checks.model_check import ModelCheck
from gpu_worker.native.checks.passed_check import PassedCheck
from tests.gpu_worker.engine_driver import fetching
from tests.tiny import InlineExecutor, tiny_config


@pytest.fixture(autouse=True)
def later_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code be older than this process, also if somebody edits it while the tests run."""
    monkeypatch.setattr(passed_check, "_IMPORTED_AT", time.time() + 3600)


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


def test_notes_are_bounded_and_other_files_stay(cache: Path, model: Path) -> None:
    folder = cache / "passed_checks"
    folder.mkdir()
    for number in range(70):
        (folder / f"{number:064x}").touch()
    (folder / "mine").touch()
    check = PassedCheck(tiny_config(model, cache_dir=cache))
    check.note([])
    assert len(list(folder.iterdir())) == 65 and (folder / "mine").exists() and check.read() == []


@pytest.mark.parametrize(
    "spoil",
    [lambda note: note.parent.chmod(0o777), lambda note: note.write_text(note.read_text()[:-1])],
    ids=["others could have written it", "it was not written to its end"],
)
def test_a_note_that_may_be_wrong_does_not_count(spoil: Callable[[Path], object], cache: Path, model: Path) -> None:
    check = PassedCheck(tiny_config(model, cache_dir=cache))
    check.note([1, None])
    assert check.read() == [1, None]
    [note] = (cache / "passed_checks").iterdir()
    spoil(note)
    assert check.read() is None


@pytest.mark.parametrize("has_folder", [True, False], ids=["no folder for notes", "a model without a folder"])
def test_where_no_note_can_be_written_there_is_none(has_folder: bool, cache: Path, model: Path) -> None:
    if has_folder:
        (cache / "passed_checks").write_text("no folder")
    check = PassedCheck(tiny_config(model if has_folder else Path("organisation/model"), cache_dir=cache))
    check.note([])
    assert check.read() is None


def test_what_changes_during_the_start_is_not_noted(cache: Path, model: Path) -> None:
    check = PassedCheck(tiny_config(model, cache_dir=cache))
    os.utime(model / "config.json", ns=(0, 1))
    check.note([])
    assert PassedCheck(tiny_config(model, cache_dir=cache)).read() is None


def test_code_that_is_newer_than_the_process_is_not_noted(
    cache: Path, model: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passed_check, "_IMPORTED_AT", code.stat().st_mtime - 1)
    check = PassedCheck(tiny_config(model, cache_dir=cache))
    check.note([])
    assert check.read() is None


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_later_start_replaces_the_same_modules_without_comparing_them(
    model: Path, cache: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = InlineExecutor()

    def start() -> list[tuple[str, str, bool]]:
        config = tiny_config(model, cache_dir=cache, dtype="auto", quantization=quantization)
        base = loop.Engine(config, fetching({}.__getitem__, executor), executor=executor).base
        return [(name, type(each).__name__, "forward" in vars(each)) for name, each in base.model.named_modules()]

    first = start()
    for module in (fused, compiled_layer):
        monkeypatch.setattr(module, "_agree", pytest.fail)
    dequantized: list[int] = []
    own = QuantizedWeight.dequantized

    def counted(self: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        dequantized.append(self.values.numel())
        return own(self, dtype)

    monkeypatch.setattr(QuantizedWeight, "dequantized", counted)
    assert start() == first
    assert any("Fused" in kind for _, kind, _ in first)
    assert len(dequantized) <= 1, "of one layer for its dtype"
