"""The encoder with bfloat16 products compared with the float32 one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.starter_pool import HELD_OUT, POOL, read_prompts
from retriever_svc.bfloat16_linear import Bfloat16Linear, has_bfloat16_products, use_bfloat16
from retriever_svc.encoder import Encoder, Vectors, unit_rows
from tests.shared_encoders import changeable_encoder, shared_encoder

needs_products = pytest.mark.skipif(not has_bfloat16_products(), reason="this processor has no bfloat16 products")
NUM_SAMPLES, NUM_PROMPTS = 2, 2


@pytest.fixture(scope="module")
def exact() -> Encoder:
    return shared_encoder(dtype="float32")


@pytest.fixture(scope="module")
def fast() -> Encoder:
    """Return an encoder as it is where OpenVINO cannot run its network."""
    encoder = changeable_encoder()
    if has_bfloat16_products():
        assert use_bfloat16(encoder._model, encoder._compute)
    return encoder


def layers_of(encoder: Encoder) -> set[str]:
    return {type(layer).__name__ for layer in encoder._model.modules()}


@needs_products
def test_vectors_of_both_encoders_are_in_one_space(exact: Encoder, fast: Encoder) -> None:
    """A pool that was embedded with float32 finds the same adapters for prompts encoded with bfloat16."""
    assert "Bfloat16Linear" in layers_of(fast) and "Bfloat16Linear" not in layers_of(exact)
    assert fast.identity == exact.identity
    names = sorted(path.name for path in POOL.iterdir() if path.is_dir())
    samples = [json.loads(line)["input"] for name in names for line in _lines(name)[:NUM_SAMPLES]]
    prompts = [prompt.input for prompt in read_prompts(HELD_OUT, NUM_PROMPTS)]
    adapters = unit_rows(exact.encode(samples).reshape(len(names), NUM_SAMPLES, -1).mean(axis=1))
    expected, found = exact.encode(prompts), fast.encode(prompts)
    assert (expected * found).sum(axis=1).min() > 0.9999
    assert len(prompts) == NUM_PROMPTS * len(names) == 24
    np.testing.assert_array_equal((found @ adapters.T).argmax(axis=1), (expected @ adapters.T).argmax(axis=1))


@needs_products
def test_a_text_has_nearly_the_same_vector_alone_and_in_a_batch(fast: Encoder) -> None:
    texts = ["Add two and three.", "Is this review positive? " * 5, "漢字", ""]
    alone = np.concatenate([fast.encode([text]) for text in texts])
    np.testing.assert_allclose(fast.encode(texts), alone, atol=4e-3)
    np.testing.assert_array_equal(fast.encode(texts), fast.encode(texts))


@needs_products
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_float32_up_to_the_rounding_of_bfloat16(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 80, bias=bias), torch.randn(2, 7, 48)
    with torch.inference_mode():
        found, expected = Bfloat16Linear(linear)(x), linear(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert not torch.equal(found, expected)


class _ReadsWeights(nn.Module):
    """Computes with a layer's weight in place of calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight.T


@needs_products
@pytest.mark.parametrize("harm", ["reads weights", "other vectors", "not finite"])
def test_a_model_that_cannot_run_with_other_layers_keeps_its_own(harm: str) -> None:
    network = _ReadsWeights() if harm == "reads weights" else nn.Sequential(nn.Linear(4, 4))
    own = dict(network.named_modules())

    def encode(texts: list[str]) -> Vectors:
        with torch.inference_mode():
            rows = network(torch.eye(4)[: len(texts)])
        is_replaced = any(isinstance(layer, Bfloat16Linear) for layer in network.modules())
        if is_replaced and harm == "other vectors":
            rows = rows.flip(0)
        return unit_rows((rows * (float("nan") if is_replaced and harm == "not finite" else 1)).numpy())

    assert not use_bfloat16(network, encode)
    assert dict(network.named_modules()) == own


def _lines(name: str) -> list[str]:
    return (POOL / name / "lora_samples.jsonl").read_text(encoding="utf-8").splitlines()
