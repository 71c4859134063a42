from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from retriever_svc.encoder import (
    CHUNK_TOKENS,
    INSTRUCTION,
    MAX_TOKENS,
    Encoder,
    Vectors,
    choose_instruction,
    split_chunks,
    unit_rows,
)
from retriever_svc.encoder_files import DEFAULT_MODEL, ENGLISH_MODEL, model_folder
from retriever_svc.errors import EncoderUnusable
from retriever_svc.packaged_encoder import CONVERSION
from tests.shared_encoders import shared_encoder
from tests.tiny_encoder import save_tiny_encoder

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
    """Return an encoder whose vectors do not depend on the batch."""
    return shared_encoder(dtype="float32")


@pytest.fixture(scope="module")
def english() -> Encoder:
    """Return one that loads in a tenth of the time."""
    return shared_encoder(ENGLISH_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def short() -> Encoder:
    """Return one that reads 16 tokens."""
    return Encoder(ENGLISH_MODEL, instruction="query: ", max_tokens=16, dtype="float32")


def test_rows_are_unit_float32_in_order(encoder: Encoder) -> None:
    rows = encoder.encode([*TEXTS, TEXTS[0]])
    assert rows.shape == (len(TEXTS) + 1, encoder.dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(rows[0], rows[-1])
    assert len(np.unique(rows.round(4), axis=0)) == len(TEXTS)
    none = encoder.encode([])
    assert (none.shape, none.dtype) == ((0, encoder.dim), np.float32)


def test_rows_are_unit_for_any_model(english: Encoder, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(model_folder(ENGLISH_MODEL), raw)
    modules = json.loads((raw / "modules.json").read_text())
    (raw / "modules.json").write_text(json.dumps(modules[:2]))  # without its Normalize module
    np.testing.assert_allclose(Encoder(raw, dtype="float32").encode(TEXTS), english.encode(TEXTS), atol=1e-5)


def test_a_batch_equals_its_texts_one_by_one(encoder: Encoder) -> None:
    texts = [f"{text} {number}" for number in range(3) for text in TEXTS]  # several chunks
    batch = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(batch, alone, atol=1e-5)


def test_rows_equal_those_of_sentence_transformers(encoder: Encoder) -> None:
    direct = encoder._model.encode(["query: " + text for text in TEXTS[:4]], normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode(TEXTS[:4]), direct, atol=1e-5)


def test_a_model_without_a_prompt_for_tasks_has_the_papers_instruction(encoder: Encoder, english: Encoder) -> None:
    assert choose_instruction(english._model) == INSTRUCTION
    direct = english._model.encode([INSTRUCTION + text for text in TEXTS[:4]], normalize_embeddings=True)
    np.testing.assert_allclose(english.encode(TEXTS[:4]), direct, atol=1e-5)
    assert choose_instruction(encoder._model) == "query: "


@pytest.mark.parametrize("model", [DEFAULT_MODEL, ENGLISH_MODEL])
def test_a_chunk_with_padding_has_at_most_its_nominal_length(model: str) -> None:
    loaded = shared_encoder(model, dtype="float32")._model
    instruction = choose_instruction(loaded)
    texts = [
        *(["Add two and three, please. " * n for n in range(60)]),
        *(["漢字 " * n for n in range(1, 60)]),
        *(["{[(a)]};" * n for n in range(1, 30)]),
        "",
        "ü",
    ]
    keys = [("me", text) for text in texts]
    chunks = list(split_chunks(keys))
    assert sorted(key for chunk in chunks for key in chunk) == sorted(keys)
    assert len(chunks) > 10
    lengths = [len(ids) for ids in loaded.tokenizer([instruction + text for text in texts])["input_ids"]]
    num_tokens = dict(zip(keys, lengths, strict=True))
    for chunk in chunks:
        assert len(chunk) * min(MAX_TOKENS, max(num_tokens[key] for key in chunk)) <= CHUNK_TOKENS


def test_no_chunk_is_empty_and_one_text_is_one_chunk() -> None:
    assert list(split_chunks([])) == []
    assert list(split_chunks([("me", "x" * 10**6)])) == [[("me", "x" * 10**6)]]
    assert list(split_chunks([("me", "\ud800")])) == [[("me", "\ud800")]]


def test_the_instruction_changes_vectors_and_identity(english: Encoder) -> None:
    plain = Encoder(ENGLISH_MODEL, instruction="", dtype="float32")
    assert np.abs(plain.encode(TEXTS[:1]) - english.encode(TEXTS[:1])).max() > 1e-2
    assert plain.identity != english.identity


def test_identity_follows_weights_and_length_not_the_folder(english: Encoder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder(ENGLISH_MODEL), copy)
    assert Encoder(copy, dtype="float32").identity == english.identity
    assert Encoder(copy, max_tokens=64, dtype="float32").identity != english.identity
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert Encoder(copy, dtype="float32").identity != english.identity


def test_the_identity_of_a_converted_encoder_follows_the_record_of_its_conversion(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "tiny")
    (folder / CONVERSION).write_text("a conversion\n")
    before = Encoder(folder, dtype="float32").identity
    settings = folder / "tokenizer_config.json"
    written = settings.read_text()
    settings.write_text(json.dumps(json.loads(written)))  # other bytes, as another library may write
    assert settings.read_text() != written
    assert Encoder(folder, dtype="float32").identity == before
    (folder / CONVERSION).write_text("another conversion\n")
    assert Encoder(folder, dtype="float32").identity != before


def test_texts_are_read_up_to_max_tokens(short: Encoder) -> None:
    head, tail = "one two three four five six seven", " eight nine ten eleven twelve thirteen"
    long, longer = short.encode([head + tail, head + tail + " and something else altogether"])
    np.testing.assert_allclose(long, longer, atol=1e-5)
    assert np.abs(short.encode([head[:13]])[0] - long).max() > 1e-2


def test_texts_are_read_up_to_64_characters_per_token(short: Encoder) -> None:
    np.testing.assert_array_equal(*short.encode([" " * 1024 + "never read", " " * 1024 + "nor this"]))
    assert np.abs(np.diff(short.encode([" " * 1000 + "read", " " * 1000 + "this too"]), axis=0)).max() > 1e-2


def test_threads_share_an_encoder(encoder: Encoder) -> None:
    batches = [[f"{text} {number}" for text in TEXTS[:4]] for number in range(6)]
    expected = [encoder.encode(batch) for batch in batches]
    small, owners = shared_encoder(max_cached_texts=8, dtype="float32"), [["me"] * len(batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for rows, alone in zip(pool.map(small.encode, batches, owners), expected, strict=True):
            np.testing.assert_allclose(rows, alone, atol=1e-5)


def test_callers_are_served_in_order_of_arrival(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that returns at once does not overtake waiting callers."""
    entered, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def compute(texts: list[str]) -> Vectors:
        order.extend(texts)
        entered.set()
        assert go_on.wait(120)
        return np.ones((len(texts), encoder.dim), np.float32)

    monkeypatch.setattr(encoder, "_compute", compute)
    with ThreadPoolExecutor(4) as callers:
        first = callers.submit(encoder.encode, ["first"])
        assert entered.wait(120)
        waiting = []
        for number, text in enumerate("abc", start=1):
            waiting.append(callers.submit(encoder.encode, [text]))
            _wait_for_queue(encoder, number)
        go_on.set()
        first.result()
        encoder.encode(["again"])
        for future in waiting:
            future.result()
    assert order == ["first", "a", "b", "c", "again"]


def _wait_for_queue(encoder: Encoder, length: int) -> None:
    until = time.monotonic() + 120
    while encoder._thread._work_queue.qsize() < length:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_one_thread_runs_the_model_for_all_callers(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    num_running = most = 0

    def compute(texts: list[str]) -> Vectors:
        nonlocal num_running, most
        threads.add(threading.get_ident())
        num_running += 1
        most = max(most, num_running)
        time.sleep(0)  # lets another thread run
        num_running -= 1
        return np.ones((len(texts), encoder.dim), np.float32)

    monkeypatch.setattr(encoder, "_compute", compute)
    with ThreadPoolExecutor(4) as callers:
        rows = list(callers.map(encoder.encode, [[str(number)] for number in range(200)]))
    assert (len(rows), len(threads), most) == (200, 1, 1)


def test_an_error_of_the_model_reaches_only_its_caller(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = encoder._compute

    def fail(texts: list[str]) -> Vectors:
        if "bad" in texts:
            raise ZeroDivisionError
        return compute(texts)

    monkeypatch.setattr(encoder, "_compute", fail)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(["bad"])
    assert encoder.encode(["good"]).shape == (1, encoder.dim)


@pytest.fixture
def computed(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every text that the model computes."""
    texts_so_far: list[str] = []
    compute = encoder._compute

    def counted(texts: list[str]) -> Vectors:
        texts_so_far.extend(texts)
        return compute(texts)

    monkeypatch.setattr(encoder, "_compute", counted)
    return texts_so_far


def test_an_owners_known_text_is_not_computed_again(encoder: Encoder, computed: list[str]) -> None:
    first = encoder.encode(["p", "q", "p"], ["me"] * 3)
    again = encoder.encode(["q", "r", "p"], ["me"] * 3)
    assert sorted(computed) == ["p", "q", "r"]
    np.testing.assert_array_equal(again[[2, 0]], first[:2])


def test_a_text_is_computed_for_each_owner_also_in_one_call(encoder: Encoder, computed: list[str]) -> None:
    encoder.encode(["s"], ["me"])
    rows = encoder.encode(["s", "t", "t", "t"], ["you", "me", "you", "me"])
    assert sorted(computed) == ["s", "s", "t", "t"]
    np.testing.assert_allclose(rows[1:], np.broadcast_to(rows[1], (3, encoder.dim)), atol=1e-5)


def test_texts_without_owner_are_not_cached(encoder: Encoder, computed: list[str]) -> None:
    encoder.encode(["u"], [""])
    encoder.encode(["u", "u"])
    encoder.encode(["v"])
    encoder.encode(["v"], [""])
    assert computed == ["u", "u", "v", "v"]


def test_lone_surrogates_do_not_affect_other_texts(encoder: Encoder) -> None:
    rows = encoder.encode(["a\ud800b", "fine"])
    np.testing.assert_allclose(rows, encoder.encode(["a?b", "fine"]), atol=1e-5)


def test_a_row_of_zeros_does_not_change() -> None:
    np.testing.assert_array_equal(unit_rows(np.asarray([[0, 0], [3, 4]], np.float32)), [[0, 0], np.float32([0.6, 0.8])])


def test_a_folder_that_is_not_a_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EncoderUnusable, match="cannot be used"):
        Encoder(tmp_path)


def test_a_model_that_is_neither_folder_nor_hub_id_is_refused_by_name() -> None:
    with pytest.raises(EncoderUnusable, match="no/such/folder"):
        Encoder("no/such/folder")


def test_the_thread_count_is_set() -> None:
    before = torch.get_num_threads()
    try:
        Encoder(ENGLISH_MODEL, num_threads=before + 1, dtype="float32")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
