from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from retriever_svc.encoder import INSTRUCTION, Encoder, Vectors, model_folder, unit_rows
from retriever_svc.errors import EncoderUnusable

TEXTS = [
    "Translate to French: the cat sleeps.",
    "",
    "Is the sentiment of this review positive or negative? I loved every minute of it, and so did my mother.",
    "2 + 2",
    "word " * 1000,
    "Ünïcödé 漢字 🙂",
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(num_threads=torch.get_num_threads())


def uncached(encoder: Encoder, texts: Sequence[str]) -> Vectors:
    encoder._cache = type(encoder._cache)(0)
    return encoder.encode(texts)


def test_rows_are_unit_float32_in_order(encoder: Encoder) -> None:
    rows = encoder.encode([*TEXTS, TEXTS[0]])
    assert rows.shape == (len(TEXTS) + 1, encoder.dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(rows[0], rows[-1])
    assert len(np.unique(rows.round(4), axis=0)) == len(TEXTS)


def test_rows_are_unit_whatever_the_model_gives(encoder: Encoder, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(model_folder("all-MiniLM-L6-v2"), raw)
    modules = json.loads((raw / "modules.json").read_text())
    (raw / "modules.json").write_text(json.dumps(modules[:2]))  # without its Normalize module
    np.testing.assert_allclose(Encoder(raw).encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def test_no_texts_give_no_rows(encoder: Encoder) -> None:
    rows = encoder.encode([])
    assert rows.shape == (0, encoder.dim)
    assert rows.dtype == np.float32


def test_a_batch_equals_its_texts_one_by_one(encoder: Encoder) -> None:
    texts = [f"{text} {number}" for number in range(12) for text in TEXTS]  # several chunks
    batch = uncached(encoder, texts)
    alone = np.concatenate([uncached(encoder, [text]) for text in texts])
    np.testing.assert_allclose(batch, alone, atol=1e-5)


def test_rows_are_what_sentence_transformers_makes_of_instruction_and_text(encoder: Encoder) -> None:
    direct = encoder._model.encode([INSTRUCTION + text for text in TEXTS[:4]], normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode(TEXTS[:4]), direct, atol=1e-5)


def test_the_instruction_changes_vectors_and_identity(encoder: Encoder) -> None:
    plain = Encoder(instruction="")
    assert np.abs(plain.encode(TEXTS[:1]) - encoder.encode(TEXTS[:1])).max() > 1e-2
    assert plain.identity != encoder.identity


def test_identity_follows_weights_and_length_not_the_folder(encoder: Encoder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder("all-MiniLM-L6-v2"), copy)
    assert Encoder(copy).identity == encoder.identity
    assert Encoder(copy, max_tokens=64).identity != encoder.identity
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert Encoder(copy).identity != encoder.identity


def test_texts_are_read_up_to_max_tokens() -> None:
    short = Encoder(max_tokens=16)
    head, tail = "one two three four five six seven", " eight nine ten eleven twelve thirteen"
    long, longer = short.encode([head + tail, head + tail + " and something else altogether"])
    np.testing.assert_allclose(long, longer, atol=1e-5)
    assert np.abs(short.encode([head[:13]])[0] - long).max() > 1e-2


def test_texts_are_read_up_to_64_characters_per_token() -> None:
    short = Encoder(max_tokens=16)
    np.testing.assert_array_equal(*short.encode([" " * 1024 + "never read", " " * 1024 + "nor this"]))
    assert np.abs(np.diff(short.encode([" " * 1000 + "read", " " * 1000 + "this too"]), axis=0)).max() > 1e-2


def test_threads_share_an_encoder(encoder: Encoder) -> None:
    batches = [[f"{text} {number}" for text in TEXTS[:4]] for number in range(6)]
    expected = [uncached(encoder, batch) for batch in batches]
    encoder._cache = type(encoder._cache)(8)
    with ThreadPoolExecutor(6) as pool:
        for rows, alone in zip(pool.map(encoder.encode, batches), expected, strict=True):
            np.testing.assert_allclose(rows, alone, atol=1e-5)


def test_a_known_text_is_not_computed_again(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    inner = encoder._compute

    def counted(texts: list[str]) -> Vectors:
        computed.extend(texts)
        return inner(texts)

    monkeypatch.setattr(encoder, "_compute", counted)
    encoder._cache = type(encoder._cache)(100)
    first = encoder.encode(["p", "q", "p"])
    again = encoder.encode(["q", "r", "p"])
    assert sorted(computed) == ["p", "q", "r"]
    np.testing.assert_array_equal(again[[2, 0]], first[:2])


def test_lone_surrogates_hurt_no_neighbour(encoder: Encoder) -> None:
    rows = encoder.encode(["a\ud800b", "fine"])
    np.testing.assert_allclose(rows, encoder.encode(["a?b", "fine"]), atol=1e-5)


def test_a_row_of_zeros_stays_as_it_is() -> None:
    np.testing.assert_array_equal(unit_rows(np.asarray([[0, 0], [3, 4]], np.float32)), [[0, 0], np.float32([0.6, 0.8])])


def test_a_folder_without_safetensors_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(EncoderUnusable, match="no safetensors weights"):
        Encoder(tmp_path)


def test_a_module_that_comes_as_a_pickle_only_is_refused_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"safetensors stand beside it")
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(EncoderUnusable, match=r"2_Dense.pytorch_model\.bin is a pickle"):
        model_folder(tmp_path)


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EncoderUnusable, match="cannot be used"):
        Encoder(tmp_path)


def test_what_is_neither_folder_nor_hub_id_is_refused_by_name() -> None:
    with pytest.raises(EncoderUnusable, match="no/such/folder"):
        Encoder("no/such/folder")


def test_the_thread_count_is_set() -> None:
    before = torch.get_num_threads()
    try:
        Encoder(num_threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
