from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from retriever_svc import Encoder, TooFewSamples, training
from retriever_svc.encoder import INSTRUCTION, load_model
from retriever_svc.errors import EncoderExists, TrainingUnavailable
from retriever_svc.training import InfoNce, TrainingSettings, train_encoder
from tests.tiny_encoder import save_tiny_encoder, topic_texts

TEXTS = topic_texts(8, seed=1)
FAST = TrainingSettings(num_epochs=6, learning_rate=3e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@dataclass
class Watched:
    """A training: what it wrote, the steps that it reported, and the texts of each call of the tokenizer."""

    folder: Path
    steps: list[tuple[int, int]] = field(default_factory=list)
    read: list[tuple[tuple[str, ...], str | None]] = field(default_factory=list)


@pytest.fixture(scope="module")
def watched(tiny: Path) -> Watched:
    found = Watched(tiny.with_name("trained"))
    preprocess = SentenceTransformer.preprocess

    def watch(self: SentenceTransformer, inputs: list[str], prompt: str | None = None, **more: object) -> object:
        found.read.append((tuple(inputs), prompt))
        return preprocess(self, inputs, prompt=prompt, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SentenceTransformer, "preprocess", watch)
        train_encoder(
            TEXTS,
            found.folder,
            model=tiny,
            settings=FAST,
            about={"share": 0.5},
            progress=lambda *step: found.steps.append(step),
        )
    return found


@pytest.fixture(scope="module")
def trained(watched: Watched) -> Path:
    return watched.folder


def hit_share(folder: Path) -> float:
    """Return how often an unseen text is nearest to the mean of its own topic."""
    encoder = Encoder(folder, dtype="float32")
    means = np.stack([encoder.encode(own).mean(axis=0) for own in TEXTS.values()])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    unseen = topic_texts(20, seed=2).values()
    hits = [(encoder.encode(own) @ means.T).argmax(axis=1) == number for number, own in enumerate(unseen)]
    return float(np.mean(hits))


def test_a_trained_encoder_distinguishes_the_tasks_of_new_texts(tiny: Path, trained: Path) -> None:
    assert hit_share(trained) > hit_share(tiny) + 0.1


def test_a_training_can_be_repeated(tiny: Path, trained: Path) -> None:
    again = train_encoder(TEXTS, tiny.with_name("again"), model=tiny, settings=FAST, about={"share": 0.5})
    assert Encoder(again).identity == Encoder(trained).identity != Encoder(tiny).identity


def test_every_text_is_trained_with_the_instruction(watched: Watched) -> None:
    assert {prompt for _, prompt in watched.read} == {INSTRUCTION}
    assert {text for inputs, _ in watched.read for text in inputs} == {text for own in TEXTS.values() for text in own}
    topics = [[text.split()[0] for text in inputs] for inputs, _ in watched.read]
    assert all(len(names) == len(TEXTS) for names in topics)  # one text of each topic in a batch


def test_the_folder_has_no_pickle_and_records_its_training(tiny: Path, trained: Path) -> None:
    files = {path.name for path in trained.rglob("*") if path.is_file()}
    assert "model.safetensors" in files
    assert {path.suffix for path in trained.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    record = json.loads((trained / "training.json").read_text())
    assert record["share"] == 0.5
    assert record["model"] == str(tiny)
    assert record["temperature"] == 0.05
    assert record["num_texts_of_task"] == {topic: len(own) for topic, own in TEXTS.items()}


def test_texts_embedded_in_pieces_give_the_loss_of_the_whole_batch(tiny: Path) -> None:
    network = load_model(tiny).eval()  # without dropout
    columns = [
        [text[: 8 * number] for number, text in enumerate(topic_texts(5, seed=seed)["boat"] * 4, start=1)]
        for seed in (1, 2)
    ]
    features = [dict(network.preprocess(texts)) for texts in columns]
    assert len({int(length) for length in features[0]["attention_mask"].sum(dim=1)}) > 5
    whole = MultipleNegativesRankingLoss(
        network, scale=20.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    loss = InfoNce(network, temperature=0.05)(features, torch.empty(0))
    torch.testing.assert_close(loss, whole(features, torch.empty(0)))
    x, y = (network.encode(texts, normalize_embeddings=True, convert_to_tensor=True) for texts in columns)
    scores = x @ y.T / 0.05
    formula = -(scores.log_softmax(dim=1).diag() + scores.log_softmax(dim=0).diag()).mean() / 2
    torch.testing.assert_close(loss.detach(), formula.detach())


def test_bfloat16_products_train_it_too(tiny: Path) -> None:
    trained = train_encoder(TEXTS, tiny.with_name("half"), model=tiny, settings=replace(FAST, bf16=True))
    assert hit_share(trained) > hit_share(tiny) + 0.1


def test_progress_is_reported_step_by_step(watched: Watched) -> None:
    assert watched.steps == [(done, 48) for done in range(1, 49)]


def test_an_encoder_is_never_overwritten(tiny: Path, trained: Path) -> None:
    with pytest.raises(EncoderExists, match="trained exists already"):
        train_encoder(TEXTS, trained, model=tiny)


def test_an_interrupted_training_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_encoder(TEXTS, tmp_path / "new" / "out", model=tiny, progress=interrupted)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_encoder_created_meanwhile_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def rival(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "theirs").touch()

    with pytest.raises(EncoderExists):
        train_encoder(TEXTS, target, model=tiny, settings=TrainingSettings(num_epochs=1), progress=rival)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_too_few_samples_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(TooFewSamples, match="too few for: boat"):
        train_encoder({**TEXTS, "boat": ["the same", "the same"]}, tmp_path / "out", model="no such model")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None if name == "datasets" else object())
    with pytest.raises(TrainingUnavailable, match=r"training needs datasets: pip install 'loraretriever\[train\]'"):
        train_encoder(TEXTS, tmp_path / "out")
