"""A converted encoder that a later start loads without torch, compared with the one that torch runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retriever_svc import saved_network
from retriever_svc.encoder import Encoder
from retriever_svc.packaged_encoder import CONVERSION
from retriever_svc.saved_network import SUFFIX, SavedEncoder
from tests.tiny_encoder import save_tiny_encoder, topic_texts

TEXTS = ["", "漢字", *topic_texts(2, seed=0)["boat"], "boat1 cake2 " * 60, "Is it so? goat3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a converted encoder, as of the packaged one, whose network one start has saved."""
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")
    (folder / CONVERSION).write_text("a conversion\n")
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prompts": {"task": "cake2 filler3 "}}))
    assert not is_saved(Encoder(folder))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made.parent, tmp_path / "encoders")
    return tmp_path / "encoders" / made.name


def place_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{SUFFIX}")


def is_saved(encoder: Encoder) -> bool:
    return isinstance(encoder._model, SavedEncoder)


def test_a_saved_encoder_gives_torchs_vectors_and_is_the_same_encoder(made: Path) -> None:
    saved, exact = Encoder(made), Encoder(made, dtype="float32")
    assert is_saved(saved) and not is_saved(exact)
    assert (saved.identity, saved.dim) == (exact.identity, exact.dim)
    found, expected = saved.encode(TEXTS), exact.encode(TEXTS)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * expected).sum(axis=1).min() > 0.9999


def test_a_saved_encoder_in_float32_gives_a_text_the_same_vector_alone_and_in_a_batch(made: Path) -> None:
    saved, torchs = Encoder(made, dtype="float32", exact_by="openvino"), Encoder(made, dtype="float32")
    assert is_saved(saved) and not is_saved(torchs)
    assert saved._model._run.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"  # type: ignore[union-attr]
    together, alone = saved.encode(TEXTS), np.concatenate([saved.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_allclose(together, torchs.encode(TEXTS), atol=5e-4)  # the tiny weights are saved in 16 bits


def test_texts_of_many_lengths_reach_the_network_in_few(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = SavedEncoder(place_of(made), 40, 1, is_exact=False), set[int]()
    run = model._run

    def recorded(inputs: list[NDArray[np.int64]]) -> Mapping[Any, NDArray[np.float32]]:
        lengths.add(inputs[0].shape[1])
        return run(inputs)

    monkeypatch.setattr(model, "_run", recorded)
    for number in range(1, model.max_seq_length + 8):
        model.encode(["cake2 " * number], prompt="")
    assert lengths == {16, 32, 40}  # and no more than it reads


def test_the_first_start_in_float32_saves_the_network_too(folder: Path) -> None:
    shutil.rmtree(place_of(folder))
    first, second = (Encoder(folder, dtype="float32", exact_by="openvino") for _ in range(2))
    assert not is_saved(first) and is_saved(second)
    np.testing.assert_allclose(first.encode(TEXTS), Encoder(folder, dtype="float32").encode(TEXTS), atol=2e-6)
    np.testing.assert_allclose(second.encode(TEXTS), first.encode(TEXTS), atol=5e-4)


@pytest.mark.parametrize("options", ["", ", dtype='float32', exact_by='openvino'"])
def test_a_saved_encoder_needs_neither_torch_nor_transformers(options: str, made: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from retriever_svc import Encoder
assert Encoder(Path({str(made)!r}), num_threads=1{options}).encode(["boat1"]).shape == (1, 32)
print(sorted({{"torch", "transformers", "sentence_transformers"}} & sys.modules.keys()))
print(sys.modules["openvino_telemetry"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "None"]  # nor does the import report to anyone


def test_an_encoder_with_other_settings_is_not_the_saved_one(made: Path) -> None:
    assert is_saved(Encoder(made, max_cached_texts=8))
    for encoder in (Encoder(made, instruction=""), Encoder(made, max_tokens=32), Encoder(made, dtype="float32")):
        assert not is_saved(encoder)


@pytest.mark.parametrize("change", ["a conversion", "a library", "a file", "no record"])
def test_a_saved_encoder_that_is_not_current_is_made_again(
    change: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, place = Encoder(folder).encode(TEXTS), place_of(folder)
    if change == "a conversion":
        (folder / CONVERSION).write_text("another conversion\n")
    elif change == "a library":
        versions = saved_network.importlib.metadata.version
        newer = {name: f"{versions(name)}.1" for name in ("openvino", "tokenizers")}
        monkeypatch.setattr(saved_network.importlib.metadata, "version", lambda name: newer.get(name) or versions(name))
    elif change == "a file":
        weights = bytearray((place / "network.bin").read_bytes())
        weights[len(weights) // 2] ^= 0xFF
        (place / "network.bin").write_bytes(weights)
    else:
        (place / "record.json").unlink()
    assert not is_saved(Encoder(folder))
    again = Encoder(folder)
    assert is_saved(again)
    np.testing.assert_allclose(again.encode(TEXTS), before, atol=4e-3)


def test_a_saved_encoder_with_other_vectors_than_torchs_is_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its files are whole, but this processor, say, computes something else."""
    place = place_of(folder)
    np.save(place / "v.npy", np.load(place / "v.npy")[::-1])
    record = json.loads((place / "record.json").read_text())
    (place / "record.json").write_text(json.dumps(saved_network._record(place, record["source"])))
    assert not is_saved(Encoder(folder))
    [warning] = [line.getMessage() for line in caplog.records if line.name.startswith("retriever_svc")]
    assert str(place) in warning and "its vectors have a cosine of" in warning


def test_a_network_that_cannot_be_saved_is_converted_at_each_start(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(place_of(folder))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_network, "build_folder", fail)
    for _ in range(2):
        assert not is_saved(Encoder(folder))
    warnings = [line.getMessage() for line in caplog.records if line.name.startswith("retriever_svc")]
    assert len(warnings) == 2 and all("No space left" in warning for warning in warnings)


@pytest.mark.parametrize(("variable", "expected"), [("3", 3), ("0", 5), ("", 5), ("many", 5)])
def test_threads_follow_the_variable_that_ray_sets_for_a_replica(
    variable: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(saved_network.os, "sched_getaffinity", lambda _: set(range(5)))
    assert saved_network._num_cpus() == expected


def test_a_saved_encoder_uses_the_threads_that_are_given(made: Path) -> None:
    model = Encoder(made, num_threads=2)._model
    assert isinstance(model, SavedEncoder)
    assert model._run.get_property("INFERENCE_NUM_THREADS") == 2  # type: ignore[attr-defined]
    assert model._run.get_property("ENABLE_CPU_PINNING") is False  # type: ignore[attr-defined]
