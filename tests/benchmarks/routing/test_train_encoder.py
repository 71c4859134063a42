from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from benchmarks.routing import train_encoder
from benchmarks.routing.encoder_network import EncoderNetwork
from benchmarks.routing.train_encoder import DOMAINS, PROMPTS, SIBLINGS, Step, Training, make_step, train
from benchmarks.routing.training_tasks import TrainingTask
from retriever_svc import Whitening
from retriever_svc.encoder_files import NAME, model_folder
from retriever_svc.ordinary_prompts import ordinary_prompts
from retriever_svc.packaged_encoder import add_training
from tests.retriever_svc.pool_fakes import FakeEncoder
from tests.shared_encoders import changeable_encoder, shared_encoder

TEXTS = ["Translate: the cat sleeps.", "把这句话翻译成英文。", "word " * 60, "a"]
LETTERS = "abcdefgh"


def domains(number: int = DOMAINS) -> dict[str, list[TrainingTask]]:
    """Return domains whose texts say their task, wording and content."""
    found = {}
    for domain in range(number):
        contents = tuple(f"content {domain} {letter}" for letter in LETTERS)
        found[f"d{domain}"] = [
            TrainingTask(
                f"{domain}-{task}",
                contents,
                tuple(f"task {domain}-{task} wording {word}: {{input}}" for word in range(5)),
                (f"tâche {domain}-{task}: {{input}}",),
                (f"direct {domain}-{task}",),
                f"about {domain}-{task}",
            )
            for task in range(SIBLINGS + 2)
        ]
    return found


def task_of(text: str) -> str:
    [name] = {word.strip(":") for word in text.split() if word[0].isdigit() and "-" in word}
    return name


def test_prompts_are_of_their_adapters_tasks_in_other_words_and_about_other_contents() -> None:
    rng, kinds = random.Random(0), Counter[str]()
    for _ in range(50):
        step = make_step(rng, domains())
        texts = list(step.texts)
        assert len(step.adapters) == DOMAINS * SIBLINGS and len(step.prompts) == PROMPTS * len(step.adapters)
        for samples, cores in step.adapters:
            own = [texts[place] for place in samples]
            assert len({task_of(text) for text in own}) == 1
            assert all(texts[core] in texts[sample] for sample, core in zip(samples, cores, strict=True))
        for place, number in zip(step.prompts, step.own, strict=True):
            samples = [texts[sample] for sample in step.adapters[number][0]]
            prompt = texts[place]
            assert task_of(prompt) == task_of(samples[0])
            kinds[prompt.split()[0]] += 1
            assert prompt not in samples
            wording, content = prompt.partition(": ")[::2]
            assert all(wording != sample.partition(": ")[0] for sample in samples)
            assert not content or all(content not in sample for sample in samples)
        ordinary = [texts[place] for place in step.ordinary]
        assert len(set(ordinary)) == train_encoder.ORDINARY + train_encoder.WORDS and {*ordinary} <= {
            *ordinary_prompts()
        }
    assert kinds["direct"] > 100 and kinds["tâche"] > 300 and kinds["task"] > 1000


def test_adapters_of_a_domain_share_the_contents_of_their_samples() -> None:
    step = make_step(random.Random(1), domains(1))
    texts = list(step.texts)
    cores = {tuple(texts[core] for core in own) for _, own in step.adapters if not texts[own[0]].startswith("about")}
    assert len(cores) == 1


def test_pairs_of_topics_and_formats_are_told_apart_by_both() -> None:
    tasks = [TrainingTask(f"{t}-{f}", ("x", "y", "z"), topic=str(t), form=str(f)) for t in range(5) for f in range(5)]
    chosen = [train_encoder._choose(random.Random(seed), tasks) for seed in range(40)]
    squares = [own for own in chosen if len({t.topic for t in own}) == len({t.form for t in own}) == 2]
    assert all(len(own) == 4 for own in chosen) and len(squares) > 20


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.sum(first * second, axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def test_the_network_computes_the_encoders_vectors_and_its_changes_are_those_that_ship() -> None:
    folder = model_folder(NAME)
    torch.manual_seed(0)
    network = EncoderNetwork(folder, 4)
    with torch.no_grad():
        plain = network(TEXTS).numpy()
        for factor in network.second.values():
            factor.normal_(std=0.1)
        trained = network(TEXTS).numpy()
    assert cosines(plain, shared_encoder(NAME, dtype="float32").encode_plain(TEXTS)).min() > 0.998
    assert cosines(plain, trained).max() < 0.98
    tensors = {name: array.astype(np.float32) for name, array in load_file(folder / "model.safetensors").items()}
    add_training(tensors, {name: part.numpy() for name, part in network.changes().items()})
    shipped = changeable_encoder(NAME)
    shipped._model[0].model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    assert cosines(trained, shipped.encode_plain(TEXTS)).min() > 0.998


class Words(nn.Module):
    """A network whose vectors are means of learned vectors of words."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(512, 16)

    def forward(self, texts: list[str]) -> torch.Tensor:
        places = [torch.tensor([crc32(word.encode()) % 512 for word in text.split()]) for text in texts]
        return torch.stack([self.rows(own).mean(0) for own in places])


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(train_encoder, "EncoderNetwork", lambda folder, rank: Words())
    torch.manual_seed(0)
    start = Whitening("e", np.zeros(16, np.float32), np.eye(16, dtype=np.float32), np.empty((0, 16, 16), np.float32))
    return Training(Path(), start)


def test_the_loss_is_that_of_the_nearest_of_adapters_and_ordinary_prompts(training: Training) -> None:
    """Computed slowly, one prompt at a time."""
    step = Step()
    step.add_adapter(["a b", "a c"], ["b", "c"])
    step.add_adapter(["d e", "d f"], ["e", "f"])
    for text, own in (("a x", 0), ("d y", 1), ("e d", 1)):
        step.add_prompt(text, own)
    step.ordinary = [step.place("hello"), step.place("how are you")]
    texts = list(step.texts)
    with torch.no_grad():
        loss, share = training.loss(step)
        rows = {text: training.vectors([text])[0].numpy().astype(np.float64) for text in texts}
    losses, first = [], []
    for place, own in zip(step.prompts, step.own, strict=True):
        scores = []
        for samples, cores in step.adapters:
            mean = sum(0.6 * rows[texts[s]] + 0.4 * rows[texts[c]] for s, c in zip(samples, cores, strict=True))
            scores.append(float(rows[texts[place]] @ mean / np.linalg.norm(mean)))
        first.append(int(np.argmax(scores)) == own)
        scores += [float(rows[texts[place]] @ rows[texts[o]]) for o in step.ordinary]
        weights = np.exp(np.asarray(scores) / 0.05)
        losses.append(-np.log(weights[own] / weights.sum()))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert share == pytest.approx(np.mean(first))


def test_the_files_are_those_of_the_encoder_that_is_trained(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoder(dtype: str, cache_dir: Path) -> FakeEncoder:
        assert (tmp_path / "training.safetensors").is_file()  # the conversion reads it
        rows = {text: np.ones(16, np.float32) for text in ordinary_prompts()}
        return FakeEncoder(rows | {"one": np.eye(16)[0], "two": np.eye(16)[1]}, dim=16)

    training.network.changes = lambda: {"w.A": torch.ones(2, 3), "w.B": torch.ones(4, 2)}  # type: ignore[assignment]
    with torch.no_grad():
        training._change += 1
    monkeypatch.setattr(train_encoder, "TRAINING_FILE", tmp_path / "training.safetensors")
    monkeypatch.setattr(train_encoder, "shipped_file", lambda stem: tmp_path / f"{stem}.safetensors")
    monkeypatch.setattr(train_encoder, "Encoder", encoder)
    identity = train_encoder.write_files(training, ["one", "two"], tmp_path)
    changes = load_file(tmp_path / "training.safetensors")
    np.testing.assert_allclose(changes["w.B"] @ changes["w.A"], np.full((4, 3), 2 * 0.7), rtol=1e-3)
    projection = Whitening.from_bytes((tmp_path / f"{identity}.safetensors").read_bytes())
    assert projection.encoder == identity
    np.testing.assert_allclose(projection.matrix, np.eye(16) + 0.7, atol=1e-3)  # the change has the scale of the start
    np.testing.assert_allclose(projection.mean, [0.5, 0.5, *[0.0] * 14], atol=1e-3)
    assert load_file(tmp_path / f"{identity}.ordinary.safetensors")["vectors"].shape == (len(ordinary_prompts()), 16)


def test_training_finds_held_out_tasks_more_often(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    every = domains(8)
    held = {name: every.pop(name) for name in ("d6", "d7")}
    pool = make_step(random.Random(3), every)
    with torch.no_grad():
        before = training.loss(pool)
    train(training, every, held, 150, 0)
    with torch.no_grad():
        after = training.loss(pool)
    assert float(after[0]) < 0.8 * float(before[0]) and after[1] > before[1]
    assert "50: loss" in capsys.readouterr().out


def test_the_mean_is_of_texts_of_every_domain() -> None:
    texts = train_encoder.choose_texts(domains(4))
    assert Counter(task_of(text).partition("-")[0] for text in texts) == {str(domain): 6 for domain in range(4)}
