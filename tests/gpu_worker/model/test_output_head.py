"""The output head over allowed ids, compared with the whole head and a mask."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpu_worker.front.draw import Draw
from gpu_worker.front.grammar.state import num_words
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.output_head import OutputHead, rows_in_parts
from gpu_worker.model.packed_linear import KernelLinear, LinearKernel
from gpu_worker.model.step_context import StepContext
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.sampling.sampling import Sampler
from gpu_worker.native.sampling.sampling_kernel import SamplingKernel
from tests.gpu_worker.engine_driver import compiled, kv_shape

VOCABULARY, WIDTH = 2_500, 8  # 79 panels, the last one of four ids
Mask = NDArray[np.uint32]


@pytest.fixture(scope="module")
def kernel() -> LinearKernel:
    return compiled(LinearKernel.load)


def mask_of(*ids: int) -> Mask:
    mask = np.zeros(num_words(VOCABULARY), np.uint32)
    for token_id in ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return mask


def weight_of() -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


def rows_of(count: int) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


def plain() -> nn.Module:
    layer = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight_of())
    return layer


def through(whole: nn.Module, x: Tensor, masks: Sequence[Mask | None]) -> tuple[Tensor, list[int]]:
    """Return the head's logits, and the number of rows of each product of whole rows."""
    step, counts = StepContext(), []
    step.fill(None, HostKvCache(kv_shape()).attention([Segment(0, 0, 1, 0)]), lambda: masks)
    whole.register_forward_hook(lambda module, inputs, output: counts.append(output.shape[-2]))
    with torch.inference_mode():
        return OutputHead(whole, step)(x), counts


def random_masks(count: int) -> list[Mask | None]:
    """Return masks of one id, few, many and all ids, those of the last panel included, and of none."""
    draw = random.Random(2)
    sizes = [draw.choice([1, 1, 2, 9, 300, VOCABULARY, 0]) for _ in range(count)]
    return [mask_of(2_499, *draw.sample(range(VOCABULARY), size - 1)) if size else None for size in sizes]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_choices_are_those_of_the_whole_head(
    is_compiled: bool, sampling: dict[str, float], kernel: LinearKernel
) -> None:
    masks, x = random_masks(20), rows_of(23)
    whole = KernelLinear(kernel, weight_of(), None) if is_compiled else plain()
    params = SamplingParams(**sampling, frequency_penalty=0.5, logit_bias=((2_499, 1.5), (7, -3.0)))
    every: list[Mask | None] = [*masks, None, None, None]
    draws = [
        Draw(params, 5, number, tokens=[1, 2_499], num_prompt_tokens=1, allowed=own) for number, own in enumerate(every)
    ]
    expected = whole(x)
    found, _ = through(whole, x, masks)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    for sampler in (Sampler(compiled(SamplingKernel.load)), Sampler()):
        assert sampler(found[0], draws) == sampler(expected[0], draws)


@torch.inference_mode()
def test_the_kernel_computes_panels_with_allowed_ids_and_no_others(kernel: LinearKernel) -> None:
    whole, x = KernelLinear(kernel, weight_of(), None), rows_of(33)  # so many that leaving out three pays
    masks = [mask_of(3, 70), None, mask_of(64, 2_498), mask_of(5)]
    expected = whole(x)[0]
    expected[0, 32:64] = expected[0, 96:] = expected[2, :64] = expected[2, 96:2_496] = expected[3] = -torch.inf
    expected[3, 5] = 0
    found, counts = through(whole, x, masks)
    assert torch.equal(found[0], expected) and not counts


@torch.inference_mode()
@pytest.mark.parametrize("is_compiled", [True, False])
def test_rows_with_one_allowed_id_need_no_product(is_compiled: bool, kernel: LinearKernel) -> None:
    whole = KernelLinear(kernel, weight_of(), None) if is_compiled else plain()
    found, counts = through(whole, rows_of(2), [mask_of(2_499), mask_of(0)])
    expected = torch.full((2, VOCABULARY), -torch.inf)
    expected[0, 2_499] = expected[1, 0] = 0
    assert torch.equal(found[0].float(), expected) and not counts


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_unsound(bad: float, is_compiled: bool, kernel: LinearKernel) -> None:
    whole = KernelLinear(kernel, weight_of(), None) if is_compiled else plain()
    x = rows_of(2)
    x[0, 0, 3] = bad
    masks = [mask_of(9), mask_of(9)]
    found, _ = through(whole, x, masks)
    draws = [Draw(SamplingParams(temperature=0), 0, 0, allowed=mask) for mask in masks]
    assert Sampler()(found[0], draws)[0] == [None, 9]


@pytest.mark.parametrize("masks", [[], [None, None]])
def test_without_masks_the_whole_head_is_computed(masks: list[Mask | None]) -> None:
    whole, x = plain(), rows_of(3)
    found, counts = through(whole, x, masks)
    assert counts == [3] and torch.equal(found, whole(x))


def cost_slowly(in_parts: Sequence[int], panels: Sequence[int], num_rows: int, per_read: int) -> float:
    left = num_rows - len(in_parts)
    return sum(panels[row] for row in in_parts) + (100 * max(left, per_read) / per_read if left else 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_rows_in_parts_are_those_of_the_least_cost(seed: int) -> None:
    draw = random.Random(seed)
    panels = [draw.choice([0, 1, 3, 30, 60, 100]) for _ in range(6)]
    num_rows, per_read = draw.choice([6, 7, 30]), draw.choice([11, 26])
    found = rows_in_parts(dict(enumerate(panels)), num_rows, 100, per_read)
    choices = [[row for row in range(6) if number >> row & 1] for number in range(64)]
    least = min(cost_slowly(choice, panels, num_rows, per_read) for choice in choices)
    assert cost_slowly(found, panels, num_rows, per_read) == pytest.approx(least)
