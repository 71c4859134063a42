"""The encoder with OpenVINO compared with torch in float32, and models that OpenVINO cannot run."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from benchmarks.starter_pool import HELD_OUT, POOL, read_prompts
from lora_store.sample_files import SAMPLES_FILE
from retriever_svc.encoder import Encoder, Vectors, unit_rows
from retriever_svc.encoder_files import DEFAULT_MODEL, ENGLISH_MODEL
from retriever_svc.openvino_network import OpenvinoNetwork, use_openvino
from tests.shared_encoders import changeable_encoder, shared_encoder
from tests.soak import Scale
from tests.tiny_encoder import save_tiny_encoder, topic_texts

NUM_SAMPLES, NUM_PROMPTS = 2, 3
TEXTS = ["", "漢字", *topic_texts(2, seed=0)["boat"], "boat1 cake2 " * 60]


def converted(model: str) -> Encoder:
    """Return an encoder whose network was converted now, and not at an earlier start."""
    encoder = changeable_encoder(model)
    assert use_openvino(encoder._model, encoder._compute)
    return encoder


@pytest.fixture(scope="module")
def fast() -> Encoder:
    return converted(ENGLISH_MODEL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


def network_of(encoder: Encoder) -> object:
    return encoder._model[0].model


def test_both_runtimes_rank_the_adapters_alike(fast: Encoder, scale: Scale) -> None:
    """A pool that torch embedded finds the same adapters, in the same order, for prompts that OpenVINO encodes."""
    rank_alike(shared_encoder(ENGLISH_MODEL, dtype="float32"), fast)
    if scale.pick("models", small=1, full=2) == 2:
        rank_alike(shared_encoder(DEFAULT_MODEL, dtype="float32"), converted(DEFAULT_MODEL))


def rank_alike(exact: Encoder, fast: Encoder) -> None:
    assert isinstance(network_of(fast), OpenvinoNetwork) and isinstance(network_of(exact), BertModel)
    assert fast.identity == exact.identity and fast.dim == exact.dim
    folders = sorted(path for path in POOL.iterdir() if path.is_dir())
    lines = [line for path in folders for line in (path / SAMPLES_FILE).read_text().splitlines()[:NUM_SAMPLES]]
    samples = exact.encode([json.loads(line)["input"] for line in lines])
    adapters = unit_rows(samples.reshape(len(folders), NUM_SAMPLES, -1).mean(axis=1))
    prompts = [prompt.input for prompt in read_prompts(HELD_OUT, NUM_PROMPTS)]
    assert len(prompts) == NUM_PROMPTS * len(folders) == 36
    expected, found = exact.encode(prompts), fast.encode(prompts)
    assert (expected * found).sum(axis=1).min() > 0.9999
    np.testing.assert_array_equal((found @ adapters.T).argmax(axis=1), (expected @ adapters.T).argmax(axis=1))
    np.testing.assert_allclose(found @ adapters.T, expected @ adapters.T, atol=0.005)


def test_a_text_has_nearly_the_same_vector_alone_and_in_a_batch(fast: Encoder) -> None:
    texts = ["Add two and three.", "Is this review positive? " * 5, "漢字", ""]
    alone = np.concatenate([fast.encode([text]) for text in texts])
    np.testing.assert_allclose(fast.encode(texts), alone, atol=4e-3)
    np.testing.assert_array_equal(fast.encode(texts), fast.encode(texts))


def test_rows_of_an_earlier_call_are_not_overwritten(tiny: Path) -> None:
    transformer = Encoder(tiny)._model[0]
    assert isinstance(transformer.model, OpenvinoNetwork)
    first, other = (transformer(transformer.preprocess([text]))["token_embeddings"] for text in ("boat1", "cake2"))
    assert first.shape == other.shape and not torch.equal(first, other)
    again = transformer(transformer.preprocess(["boat1"]))["token_embeddings"]
    assert torch.equal(first, again)


def test_it_uses_as_many_threads_as_torch(tiny: Path) -> None:
    network = network_of(Encoder(tiny))
    assert isinstance(network, OpenvinoNetwork) and network.run is not None
    assert network.run.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()  # type: ignore[attr-defined]
    assert network.run.get_property("ENABLE_CPU_PINNING") is False  # type: ignore[attr-defined]


class _Refuses(BertModel):
    def forward(self, *args: object, **kwargs: object) -> object:
        if torch.jit.is_tracing():
            raise RuntimeError("a loop that cannot be traced\nwith details")
        return super().forward(*args, **kwargs)


class _Unknown(BertModel):
    """Uses an operator that OpenVINO lacks."""

    def forward(self, *args: object, **kwargs: object) -> object:
        result = super().forward(*args, **kwargs)
        result.last_hidden_state = result.last_hidden_state + 0 * torch.special.bessel_j0(result.last_hidden_state)
        return result


class _Constant(BertModel):
    """Adds a number that the tracer takes for a constant: the length of the text of the first call."""

    def forward(self, *args: object, **kwargs: object) -> object:
        result = super().forward(*args, **kwargs)
        scale = torch.zeros(self.config.hidden_size)
        scale[int(kwargs["input_ids"].shape[1]) % 32] = 10.0  # type: ignore[attr-defined]
        result.last_hidden_state = result.last_hidden_state + scale
        return result


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_Refuses, "Couldn't get TorchScript module by tracing."),
        (_Unknown, "bessel_j0"),
        (_Constant, "its vectors have a cosine of"),
    ],
)
def test_a_model_that_openvino_cannot_run_keeps_its_own_network(
    tiny: Path, kind: type[BertModel], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(tiny, dtype="float32")
    network = kind.from_pretrained(tiny)
    encoder._model[0].model = network
    expected = encoder.encode(TEXTS)
    root = logging.getLogger()
    logs = root.level, root.filters[:], root.handlers[:]
    with caplog.at_level(logging.WARNING, "retriever_svc"):
        assert not use_openvino(encoder._model, encoder._compute)
    assert (root.level, root.filters, root.handlers) == logs
    assert network_of(encoder) is network
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    [record] = caplog.records
    assert reason in record.getMessage() and "\n" not in record.getMessage()


def test_a_model_with_vectors_that_are_not_finite_keeps_its_own_network(tiny: Path) -> None:
    encoder = Encoder(tiny, dtype="float32")

    def encode(texts: list[str]) -> Vectors:
        rows = encoder._compute(texts)
        return rows * np.float32(np.nan) if isinstance(network_of(encoder), OpenvinoNetwork) else rows

    assert not use_openvino(encoder._model, encode)
    assert isinstance(network_of(encoder), BertModel)


def test_the_import_of_openvino_reports_nothing(fast: Encoder) -> None:
    """Where the package openvino_telemetry can be imported, that sends an event to Google Analytics."""
    assert isinstance(network_of(fast), OpenvinoNetwork)
    assert importlib.metadata.version("openvino-telemetry")
    assert sys.modules["openvino_telemetry"] is None
    assert type(sys.modules["openvino.tools.ovc"].telemetry).__module__ == "openvino.tools.ovc.telemetry_stub"
