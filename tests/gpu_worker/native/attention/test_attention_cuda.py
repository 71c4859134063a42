"""The packing of a step for varlen_attn: on the CPU with a slow operator against host memory, on a GPU with torch's."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gpu_worker.front.request.request import Job
from gpu_worker.model.attention_plan import Segment
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from gpu_worker.native.memory_plan import PAGE_TOKENS
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import MakeEngine, assert_same, by_digest, greedy, kv_shape, run_together
from tests.gpu_worker.slow_varlen_attention import slow_varlen_attn
from tests.tiny import TinyBase, TinyFolders, assert_equal_logits, linear_shapes, plan_of, random_adapter, tiny_config

CPU = torch.device("cpu")
WINDOWS = pytest.mark.parametrize("window", [None, 12, 1, 500])
# Consecutive steps of a few rows, as (row, new tokens); 6 rows of at most 200 tokens.
STEPS = {
    "prompts": [[(0, 7), (1, 30)]],
    "chunks": [[(0, 64), (1, 3)], [(1, 1), (0, 64)], [(1, 1), (0, 50)]],
    "decodes": [[(0, 63), (1, 5), (2, 100)], [(0, 1), (1, 1), (2, 1)], [(0, 1), (1, 1), (2, 1)]],
    "all kinds": [[(2, 70), (0, 1)], [(0, 1), (2, 1), (1, 33)], [(2, 1), (0, 1), (1, 20), (3, 2)]],
}


def shape_of(dtype: torch.dtype, page_tokens: int, head_dim: int = 8) -> KvShape:
    sizes = {"num_layers": 2, "num_heads": 2, "head_dim": head_dim, "num_rows": 6, "max_len": 200}
    return kv_shape(**sizes, dtype=dtype, num_tokens=1200, page_tokens=page_tokens)


def attended(cache: KvCache, steps: list[list[tuple[int, int]]], window: int | None, device: torch.device) -> Tensor:
    """Return the attention output of every token of the steps in layer 1; random tokens are equal for all caches."""
    torch.manual_seed(0)
    dtype, head_dim = cache.shape.dtype, cache.shape.head_dim
    rows = {row: cache.allocate(1, 200) for row in sorted({row for step in steps for row, _ in step})}
    lengths, outputs = dict.fromkeys(rows, 0), []
    for step in steps:
        segments, start = [], 0
        for row, num_tokens in step:
            segments.append(Segment(rows[row], start, num_tokens, lengths[row]))
            start, lengths[row] = start + num_tokens, lengths[row] + num_tokens
            assert cache.grow(rows[row], lengths[row])
        query, key, value = (torch.randn(heads, start, head_dim).to(device, dtype) for heads in (4, 2, 2))
        plan = cache.attention(segments)
        assert plan.token_positions.tolist() == [s.context_len + i for s in segments for i in range(s.num_tokens)]
        outputs.append(plan.attend(1, query, key, value, scaling=0.3, sliding_window=window).cpu())
        for row, length in lengths.items():
            cache.computed(rows[row], length)
    return torch.cat(outputs)


@WINDOWS
@pytest.mark.parametrize("page_tokens", [16, 256])
@pytest.mark.parametrize("name", STEPS)
def test_attention_over_pages_equals_attention_in_host_memory(name: str, page_tokens: int, window: int | None) -> None:
    shape = shape_of(torch.float32, page_tokens)
    pages = DeviceKvCache(shape, CPU, slow_varlen_attn)
    shuffled_rows = [pages.allocate(1, 40) for _ in range(4)]  # so that the pages of a row are not in order
    for row in shuffled_rows[::2] + shuffled_rows[1::2]:
        pages.free(row)
    found = attended(pages, STEPS[name], window, CPU)
    torch.testing.assert_close(found, attended(HostKvCache(shape), STEPS[name], window, CPU), atol=1e-5, rtol=1e-5)


def test_only_steps_of_single_tokens_have_no_bound_on_later_tokens() -> None:
    """Flash attention 2 then reads each key once for all query heads that share it."""
    bounds = []

    def attend(*given: Any, window_size: tuple[int, int], **named: Any) -> Tensor:
        bounds.append(window_size)
        return slow_varlen_attn(*given, window_size=window_size, **named)

    for window in (None, 12):
        attended(DeviceKvCache(shape_of(torch.float32, 16), CPU, attend), STEPS["decodes"], window, CPU)
    assert bounds == [(-1, 0), (-1, -1), (-1, -1), (11, 0), (11, 0), (11, 0)]


@pytest.mark.parametrize("page_tokens", [16, 256])
@pytest.mark.parametrize("name", STEPS)
def test_a_window_layer_without_its_older_pages_attends_as_with_them(name: str, page_tokens: int) -> None:
    """Freed pages hold NaN. The layer before it keeps whole rows."""
    shape = shape_of(torch.float32, page_tokens)
    windowed = replace(shape, window=12, window_layers=frozenset({1}), num_window_tokens=6 * 200)
    expected = attended(HostKvCache(shape), STEPS[name], 12, CPU)
    host, device = HostKvCache(windowed), DeviceKvCache(windowed, CPU, slow_varlen_attn)
    for cache in (host, device):
        for store in cache.stores:
            store.fill_(torch.nan)
        torch.testing.assert_close(attended(cache, STEPS[name], 12, CPU), expected, atol=1e-5, rtol=1e-5)


def test_the_slow_operator_has_the_signature_of_torchs() -> None:
    slow, own = (inspect.signature(function).parameters for function in (slow_varlen_attn, varlen_attn))
    assert [(p.name, p.kind, p.default) for p in slow.values()] == [
        (p.name, p.kind, p.default) for p in own.values() if p.name not in ("return_aux", "num_splits")
    ]


def jobs_over(pool: list[AdapterWeights]) -> list[Job]:
    plans = [BASE_PLAN, plan_of("selection", (pool[0], 1.0)), plan_of("fusion", (pool[0], 0.5), (pool[1], 0.5))]
    prompts = ["a", "the quick brown fox", "0123456789" * 7, "x y", "lorem ipsum " * 4]
    return [greedy(prompt, plans[i % 3], i, num_new=20) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("family", ["gemma3", "llama", "qwen3"])
def test_an_engine_over_device_pages_answers_like_one_in_host_memory(
    family: str, make_engine: MakeEngine, tiny_base: TinyBase
) -> None:
    """Long prompts come in chunks, rows start and end, and with few pages some rows are preempted and recomputed."""
    pool = [random_adapter(linear_shapes(tiny_base(family)), seed) for seed in range(2)]
    adapters, jobs = by_digest(*pool), jobs_over(pool)
    over_pages = make_engine(
        adapters, family, kv_tokens=160, build_kv_cache=lambda shape: DeviceKvCache(shape, CPU, slow_varlen_attn)
    )
    for found, expected in zip(
        run_together(over_pages, jobs), run_together(make_engine(adapters, family), jobs), strict=True
    ):
        assert_same(found, expected)
    assert over_pages.counters.num_preemptions > 0
    assert (over_pages.kv_cache.num_free, over_pages.kv_cache.num_free_tokens) == (8, 160)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.mark.gpu
@needs_cuda
@WINDOWS
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("name", STEPS)
def test_torchs_operator_equals_the_slow_one(name: str, head_dim: int, window: int | None) -> None:
    shape, cuda = shape_of(torch.bfloat16, PAGE_TOKENS["cuda"], head_dim), torch.device("cuda")
    found = attended(DeviceKvCache(shape, cuda), STEPS[name], window, cuda)
    expected = attended(DeviceKvCache(shape, CPU, slow_varlen_attn), STEPS[name], window, CPU)
    assert_equal_logits(found, expected)


@pytest.mark.gpu
@needs_cuda
def test_an_engine_on_cuda_answers_like_one_on_the_cpu(
    make_engine: MakeEngine, tiny_folders: TinyFolders, tiny_base: TinyBase
) -> None:
    pool = [random_adapter(linear_shapes(tiny_base()), seed) for seed in range(2)]
    adapters, jobs = by_digest(*pool), jobs_over(pool)
    on_cuda, on_cpu = (
        make_engine(adapters, base=load_base_model(config), device=config.device, dtype=config.dtype)
        for device in ("cuda", "cpu")
        for config in [tiny_config(tiny_folders["gemma3"], device=device, dtype="bfloat16")]
    )
    for found, expected in zip(run_together(on_cuda, jobs), run_together(on_cpu, jobs), strict=True):
        assert_equal_logits(found.first_logits.bfloat16(), expected.first_logits.bfloat16())
