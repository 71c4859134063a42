from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.config import NativeWorkerConfig, WorkerConfig
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model import packaged_model
from gpu_worker.model.base_model import model_source
from gpu_worker.native.kernels.kernel_build import kernel_names
from tests.gpu_worker.compilers import script


def test_the_packaged_weights_are_joined_without_importing_their_packages(tmp_path: Path) -> None:
    """Joining also compares their hash with the known one."""
    code = (
        "import sys; from pathlib import Path; from gpu_worker.model.packaged_model import assemble; "
        "assemble(Path(sys.argv[1])); "
        "assert not [name for name in sys.modules if name.startswith('gemma3_270m')]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.gguf")], check=True, timeout=300)
    assert (tmp_path / "model.gguf").stat().st_size > 100_000_000


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "_PARTS", packaged_model._PARTS[:1])
    with pytest.raises(BaseModelUnsupported, match="have SHA-256"):
        packaged_model.assemble(tmp_path / "model.gguf")


def test_a_package_that_is_not_installed_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged_model, "_PARTS", (("no-such-package", "file"),))
    with pytest.raises(BaseModelUnsupported, match=r"loraretriever\[local\]"):
        packaged_model.assemble(tmp_path / "model.gguf")


def test_another_process_converts_what_the_cache_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):  # of the other process, which cannot create the cache folder there
        packaged_model.ensure_converted(WorkerConfig(cache_dir=tmp_path / "file"))
    monkeypatch.setattr(packaged_model, "_convert_into", lambda folder, convert: folder.mkdir())
    monkeypatch.setattr(packaged_model, "_is_whole", lambda folder: True)
    monkeypatch.setattr(packaged_model, "ProcessPoolExecutor", None)  # calling it would fail
    for quantization in ("none", "int8"):
        config = NativeWorkerConfig(cache_dir=tmp_path, quantization=quantization)
        with pytest.raises(TypeError):
            packaged_model.ensure_converted(config)
        assert model_source(config).startswith(str(tmp_path))  # converts what the worker will read
        packaged_model.ensure_converted(config)


def test_kernels_are_compiled_while_the_model_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here the compiler writes files that are no libraries, and the conversion cannot take its lock."""
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", 'for last; do :; done; echo "no library" > "$last"')))
    (tmp_path / f".{packaged_model.PACKAGED_MODEL}.lock").mkdir()
    with pytest.raises(OSError, match="lock"):
        packaged_model.ensure_converted(NativeWorkerConfig(cache_dir=tmp_path))
    assert len(list((tmp_path / "native").glob("*.so"))) == len(kernel_names())
    assert "kernel" not in capfd.readouterr().err, "the worker says it"


def test_a_conversion_shows_no_progress_bars_of_other_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        (target / "model.safetensors").write_text("weights")
        print("Loading weights: 100%", file=sys.stderr)

    monkeypatch.setattr(packaged_model, "assemble", lambda gguf: None)
    monkeypatch.setattr(packaged_model, "_convert", convert)
    monkeypatch.setattr(packaged_model, "_keep_integers", convert)
    folder = packaged_model.packaged_folder(tmp_path)
    assert packaged_model.packaged_folder(tmp_path, keeps_integers=True) != folder, "each form has its folder"
    assert (folder / "model.safetensors").read_text() == "weights"
    assert capsys.readouterr().err == ""


def test_a_conversion_that_fails_shows_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        print("a tensor is missing", file=sys.stderr)
        raise ValueError("no")

    monkeypatch.setattr(packaged_model, "assemble", lambda gguf: None)
    monkeypatch.setattr(packaged_model, "_convert", convert)
    with pytest.raises(ValueError, match="no"):
        packaged_model.packaged_folder(tmp_path)
    assert capsys.readouterr().err == "a tensor is missing\n"
    assert not (tmp_path / packaged_model.PACKAGED_MODEL).exists()
