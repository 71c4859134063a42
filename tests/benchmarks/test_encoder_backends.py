"""The parts of the comparison that every runtime shares, compared with the server's encoder and with loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.encoder_backends import Exported, Runtime, in_chunks, pooled, top1
from retriever_svc.encoder import Encoder, load_model
from retriever_svc.encoder_files import ENGLISH_MODEL


def test_the_mean_leaves_out_padding_and_has_length_one() -> None:
    hidden = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    for row, (values, kept) in enumerate(zip(hidden, mask, strict=True)):
        mean = np.mean([values[place] for place in range(4) if kept[place]], axis=0)
        np.testing.assert_allclose(pooled(hidden, mask)[row], mean / np.linalg.norm(mean), rtol=1e-5)


def test_an_exported_network_embeds_as_the_servers_encoder() -> None:
    model = load_model(ENGLISH_MODEL)
    network = Exported(model[0].auto_model).eval()

    @torch.inference_mode()
    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found: np.ndarray = network(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        return found

    texts = ["Is this review positive?", "word " * 400, "", "Translate: good morning"]
    expected = Encoder(ENGLISH_MODEL, dtype="float32").encode_plain(texts)
    np.testing.assert_allclose(in_chunks(Runtime(model, forward), texts), expected, atol=2e-5)


def test_rows_keep_the_order_of_the_texts_and_equal_texts_are_embedded_once() -> None:
    seen: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([[len(text), 1.0] for text in texts], np.float32)

    texts = ["four", "a", "four", "two words"]
    assert in_chunks(embed, texts)[:, 0].tolist() == [4, 1, 4, 9]
    assert sorted(seen) == ["a", "four", "two words"]


def test_top1_counts_the_questions_whose_own_adapter_is_first() -> None:
    adapters = np.eye(3, dtype=np.float32)
    questions = np.array([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.5, 0.1, 0.4], [0, 0, 1]], np.float32)
    assert top1(adapters, questions, np.array([0, 1, 2, 2])) == pytest.approx(0.75)
