"""Planned memory equals used memory, and a plan that does not fit stops the start with the sum."""

from __future__ import annotations

import logging
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gpu_worker.bank.device_memory import MappingLimit
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.model.base_model import BaseModel, load_base_model
from gpu_worker.native import memory_plan
from gpu_worker.native.loop import Engine
from gpu_worker.native.memory_plan import MemoryPlan, plan_memory
from tests.gpu_worker.engine_driver import MakeEngine
from tests.tiny import TinyBase, TinyFolders, tiny_config

GIB = 1 << 30
TOKEN_BYTES = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, float32


@pytest.fixture
def plan(tiny_base: TinyBase, tiny_folders: TinyFolders) -> Callable[..., MemoryPlan]:
    base = tiny_base("llama")

    def make(free_bytes: int, *limits: MappingLimit, **changes: object) -> MemoryPlan:
        return plan_memory(tiny_config(tiny_folders["llama"], **changes), base, free_bytes, limits)

    return make


def test_the_parts_of_the_plan_equal_the_engines_use(
    plan: Callable[..., MemoryPlan], make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gpu_worker.native.memory_plan"):
        engine = make_engine({}, "llama", kv_tokens=320)
    planned = plan(GIB, kv_tokens=320)
    assert planned.bank_bytes == engine.memory.bank_bytes == engine.bank.num_bytes
    assert planned.kv_bytes == engine.memory.kv_bytes == engine.kv_cache.num_bytes == 320 * TOKEN_BYTES
    assert planned.weights_bytes == sum(parameter.nbytes for parameter in engine.base.model.parameters())
    assert str(engine.memory) in caplog.text
    assert planned.total_bytes == sum(
        (planned.weights_bytes, planned.bank_bytes, planned.headroom_bytes, planned.kv_bytes)
    )


def test_with_enough_memory_every_row_may_have_its_maximum_length(plan: Callable[..., MemoryPlan]) -> None:
    assert plan(GIB).kv.num_tokens == 8 * 160
    assert plan(GIB, max_model_len=150).kv.num_tokens == 8 * 160, "whole pages"
    assert plan(GIB, max_model_len=5000).kv.num_tokens == 8 * 512, "the model's own bound"
    assert plan(GIB, kv_tokens=200).kv.num_tokens == 208
    assert plan(GIB, kv_tokens=1_000_000).kv.num_tokens == 8 * 160, "no more than rows can use"


def windowed(base: BaseModel) -> BaseModel:
    """Return a base model of three layers, two of which see 20 tokens."""
    return replace(base, window=20, window_layers=frozenset({0, 1}))


def test_layers_with_a_window_plan_what_rows_and_prefixes_hold(tiny_base: TinyBase, tiny_folders: TinyFolders) -> None:
    """Eight rows of 512 tokens hold at most four pages each in a window, and a step computes four pages more."""
    base, folder = tiny_base("llama"), tiny_folders["llama"]
    of_layer, ample = TOKEN_BYTES // 3, {"max_model_len": 512, "max_step_tokens": 64}
    for changes, num_window_tokens in (
        ({}, (8 * 4 * 2 + 4) * 16),
        ({"prefix_cache": False}, (8 * 4 + 4) * 16),
        ({"prefix_cache_share": 0.5}, (8 * 4 + 16 + 4) * 16),
    ):
        found = plan_memory(tiny_config(folder, **ample, **changes), windowed(base), GIB)
        assert (found.kv.num_tokens, found.kv.num_window_tokens) == (8 * 512, num_window_tokens)
        assert found.kv_bytes == (8 * 512 + 2 * num_window_tokens) * of_layer
        saved = (8 * 512 - num_window_tokens) * 2 * of_layer / (1 << 20)
        assert f"KV of 4096 tokens (2 of 3 layers keep a window of 20, which saves {saved:,.0f} MiB)" in str(found)
    short = plan_memory(tiny_config(folder, max_model_len=20), windowed(base), GIB)
    assert short.kv.window_layers == frozenset(), "no row outgrows the window"


@pytest.mark.parametrize("num_tokens", [512, 1024, 2000, 4000])
def test_memory_that_is_left_is_used_with_windows_too(
    num_tokens: int, tiny_base: TinyBase, tiny_folders: TinyFolders
) -> None:
    base = windowed(tiny_base("llama"))
    config = tiny_config(tiny_folders["llama"], max_model_len=512, prefix_cache=False)
    ample = plan_memory(config, base, GIB)
    fixed = ample.total_bytes - ample.kv_bytes - int(0.05 * GIB)
    wanted = num_tokens + 2 * min(num_tokens, 576)
    found = plan_memory(config, base, int((fixed + wanted * TOKEN_BYTES // 3) / 0.95) + 2)
    assert found.kv.num_tokens == num_tokens // 16 * 16 and found.total_bytes <= found.free_bytes


def test_less_memory_gives_less_kv_and_too_little_stops_with_the_sum(plan: Callable[..., MemoryPlan]) -> None:
    ample = plan(GIB)
    fixed = ample.total_bytes - ample.kv_bytes - int(0.05 * GIB)
    for num_tokens in (1024, 160):
        found = plan(int((fixed + num_tokens * TOKEN_BYTES) / 0.95) + 2)
        assert found.kv.num_tokens == num_tokens and found.total_bytes <= found.free_bytes
    with pytest.raises(WorkerConfigInvalid, match=r"KV of 160 tokens .* = .* MiB of .* MiB free on cpu"):
        plan(int((fixed + 159 * TOKEN_BYTES) / 0.95))


def test_memory_that_may_not_be_mapped_stops_the_start_with_the_sum(plan: Callable[..., MemoryPlan]) -> None:
    found = plan(GIB, kv_tokens=160)
    needed = found.total_bytes
    assert plan(GIB, MappingLimit("RLIMIT_AS", needed), kv_tokens=160) == found
    message = r"KV of 160 tokens \d+ MiB = \d+ MiB of .* and of \d+ MiB that RLIMIT_AS leaves; lower kv_tokens"
    for limits in ([("RLIMIT_AS", needed - 1)], [("RLIMIT_DATA", needed), ("RLIMIT_AS", needed - 1)]):
        with pytest.raises(WorkerConfigInvalid, match=message):
            plan(GIB, *[MappingLimit(*limit) for limit in limits], kv_tokens=160)


@pytest.fixture
def address_space() -> Iterator[None]:
    """Leave this process 1 GiB until the end of the test."""
    status = Path("/proc/self/status").read_text()
    used = int(re.findall(r"VmSize:\s+(\d+) kB", status)[0]) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("address_space")
def test_a_worker_in_a_process_with_too_little_address_space_is_refused_by_name(tiny_folders: TinyFolders) -> None:
    large = {"max_model_len": 512, "max_batch_size": 10_000, "max_step_tokens": 10_000, "kv_tokens": 5_120_000}
    config = tiny_config(tiny_folders["llama"], bank_rank_rows=8, **large)
    with pytest.raises(WorkerConfigInvalid, match="that RLIMIT_AS leaves"):
        Engine(config, lambda digest: pytest.fail("nothing is fetched"))


@pytest.mark.parametrize(
    ("changes", "part"), [({"kv_tokens": 160 * 8}, "KV"), ({"bank_rank_rows": 100_000}, "bank"), ({}, "weights")]
)
def test_the_sum_contains_the_setting_that_cannot_fit(
    changes: dict[str, object], part: str, plan: Callable[..., MemoryPlan]
) -> None:
    needed = plan(GIB, **changes)
    with pytest.raises(WorkerConfigInvalid) as caught:
        plan((needed.total_bytes - needed.headroom_bytes) // 2, **changes)
    terms = re.findall(r"([\d,]+) MiB", str(caught.value))
    assert part in str(caught.value) and len(terms) == 6


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_tied_output_head_in_bfloat16_counts_twice_only_where_onednn_packs_it(
    has_kernel: bool, tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma3 ties them. The embedding is looked up in what the kernel packs, and not in what oneDNN packs."""
    monkeypatch.setattr(memory_plan, "choose_linear_kernel", lambda model, config: has_kernel or None)
    config = tiny_config(tiny_folders["gemma3"], dtype="bfloat16")
    base = load_base_model(config)
    embedding = base.model.get_input_embeddings().weight
    assert base.model.get_output_embeddings().weight is embedding
    num_bytes = sum(parameter.nbytes for parameter in base.model.parameters())
    assert plan_memory(config, base, GIB).weights_bytes == num_bytes + (0 if has_kernel else embedding.nbytes)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_integer_weights_count_as_the_packed_layers_hold_them(
    family: str, tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied model has one matrix for its embedding and its output head."""
    monkeypatch.setattr(memory_plan, "choose_linear_kernel", lambda model, config: True)  # on every processor
    planned = {}
    for quantization in ("none", "int8", "int4"):
        config = tiny_config(tiny_folders[family], dtype="bfloat16", quantization=quantization)
        base = load_base_model(config)
        planned[quantization] = plan_memory(config, base, GIB).weights_bytes
    linears = sum(module.weight.numel() for module in base.model.modules() if isinstance(module, nn.Linear))
    rows = 300 * 32 if family == "llama" else 0  # an embedding of its own has 8 bits with either setting
    norms = planned["none"] - 2 * (linears + rows)
    assert 0 < norms < 3000
    assert 1 < (planned["int8"] - norms) / (linears + rows) < 1.13
    assert 0.625 <= (planned["int4"] - norms - rows) / linears < 0.7


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_weights_of_a_float32_model_take_half_its_memory(tiny_folders: TinyFolders) -> None:
    planned = {}
    for dtype in ("float32", "auto"):
        config = tiny_config(tiny_folders["gemma3"], dtype=dtype)
        planned[dtype] = plan_memory(config, load_base_model(config), GIB)
    whole, half = planned["float32"], planned["auto"]
    assert 0.5 < half.weights_bytes / whole.weights_bytes < 0.53
    assert (half.bank_bytes, half.kv_bytes) == (whole.bank_bytes, whole.kv_bytes)


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_device_stops_the_start() -> None:
    with pytest.raises(WorkerConfigInvalid, match="cuda"):
        Engine(NativeWorkerConfig(device="cuda"), lambda digest: pytest.fail("nothing is fetched"))
