from __future__ import annotations

import json
from pathlib import Path

import pytest

from retriever_svc import Encoder
from tests.deployments.sample_stores import store_of
from tests.deployments.scripted import run, words
from tests.tiny_encoder import save_tiny_encoder, topic_texts

TEXTS = topic_texts(3, seed=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    file = tmp_path / "samples.jsonl"
    lines = [json.dumps({"task": topic, "text": text}) for topic, own in TEXTS.items() for text in own]
    file.write_text("\n".join(lines) + "\n")
    return file


def record_of(encoder: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((encoder / "training.json").read_text())
    return record


def test_an_encoder_is_trained_on_a_file(samples: Path, tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    options = ("--samples", samples, "--encoder", tiny, "--epochs", 1, "--share", 0.5, "--seed", 4)
    result = run("pool", "train", target, *options)
    assert result.exit_code == 0, result.stderr
    assert "on 2 tasks in" in words(result.stdout)
    record = record_of(target)
    assert record["num_texts_of_task"] == {"cake": 3, "goat": 3}
    assert (record["share"], record["seed"], record["num_epochs"]) == (0.5, 4, 1)
    assert Encoder(target).identity != Encoder(tiny).identity


def test_an_encoder_is_trained_on_the_adapters_that_a_tenant_sees(tiny: Path, tmp_path: Path) -> None:
    store = store_of(tmp_path, TEXTS)
    options = ("--store", store, "--encoder", tiny, "--epochs", 1)
    printed = json.loads(run("pool", "train", tmp_path / "local", *options, "--json").stdout)
    assert (printed["encoder"], printed["tasks"]) == (str(tmp_path / "local"), ["cake", "debt", "goat"])
    assert record_of(tmp_path / "local")["num_texts_of_task"] == {"cake": 3, "debt": 3, "goat": 3}
    assert run("pool", "train", tmp_path / "other", *options, "--tenant", "other").exit_code == 0
    assert record_of(tmp_path / "other")["num_texts_of_task"] == {
        "boat": 3,
        "local/cake": 3,
        "local/debt": 3,
        "local/goat": 3,
    }


def test_a_missing_file_an_empty_store_and_no_source_are_reported(tmp_path: Path, samples: Path) -> None:
    out = tmp_path / "out"
    assert "no such file" in words(run("pool", "train", out, "--samples", tmp_path / "none").stderr)
    assert "no samples to train on" in words(run("pool", "train", out, "--store", tmp_path / "none").stderr)
    assert "either --store or --samples" in words(run("pool", "train", out).stderr)
    assert "neither modules.json nor config.json" in words(
        run("pool", "train", out, "--samples", samples, "--encoder", tmp_path).stderr
    )
