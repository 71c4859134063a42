"""The comparison of logits that both engines' checks at start share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_worker.model.eager_check import (
    DIGEST,
    Difference,
    EagerLogits,
    adding,
    check_adapter,
    check_prompts,
    hooked,
    jittering,
)
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize(
    ("dtype", "change", "is_beyond"),
    [
        (torch.float32, 1e-5, False),
        (torch.float32, 1e-2, True),
        (torch.bfloat16, 0.25, False),
        (torch.bfloat16, 1.0, True),
        (torch.float32, float("nan"), True),
    ],
)
def test_a_token_is_beyond_the_bound_of_its_dtype(dtype: torch.dtype, change: float, is_beyond: bool) -> None:
    expected = torch.tensor([[8.0, -8.0], [8.0, 1.0]], dtype=dtype)
    found = expected.clone()
    found[1, 0] += change
    assert Difference.of(found, expected).beyond.tolist() == [False, is_beyond]


def test_float32_allows_no_difference_and_bfloat16_what_rounding_makes() -> None:
    exact = torch.tensor([[1.0, 2.0]] * 4)
    assert EagerLogits(exact, exact + 1).allowed == 0.0
    half = exact.bfloat16()
    jittered = half.clone()
    jittered[0] += 1.0
    assert EagerLogits(half, half).allowed == 0.5
    assert EagerLogits(half, jittered).allowed == 0.5 + 2 / 4


def test_prompts_have_one_length_and_ids_that_the_model_embeds() -> None:
    prompts = check_prompts(byte_tokenizer(), 50, 8, ("a longer text", "short"))
    assert [len(tokens) for tokens in prompts] == [len(byte_tokenizer()("short").input_ids)] * 2
    assert all(0 <= token < 50 for tokens in prompts for token in tokens)


def test_hooks_add_the_adapter_and_rounding_and_are_gone_afterwards() -> None:
    torch.manual_seed(0)
    linears = {"up": nn.Linear(6, 5, bias=False)}
    x = torch.randn(3, 6)
    plain = linears["up"](x)
    adapter = check_adapter(linears, rank=2)
    module = adapter.modules["up"]
    assert adapter.weights_digest == DIGEST and (module.a.shape, module.bt.shape) == ((2, 6), (2, 5))
    with hooked(linears, adding(adapter)):
        torch.testing.assert_close(linears["up"](x), plain + x @ module.a.T @ module.bt)
    with hooked(linears, jittering()):
        jittered = linears["up"](x)
    assert 0 < (jittered - plain).abs().max() < 0.05 * plain.abs().max()
    assert torch.equal(linears["up"](x), plain)
