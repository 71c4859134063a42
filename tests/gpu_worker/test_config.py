from __future__ import annotations

from typing import Any

import pytest

from gpu_worker.config import NativeWorkerConfig, VllmWorkerConfig, WorkerConfig
from gpu_worker.errors import WorkerConfigInvalid
from lora_store.bounded_files import Limits


@pytest.mark.parametrize("field", ["bank_rank_rows", "max_batch_size", "max_model_len", "max_waiting", "load_threads"])
def test_a_setting_below_one_stops_start_up(field: str) -> None:
    with pytest.raises(WorkerConfigInvalid, match=field):
        WorkerConfig(**{field: 0})  # type: ignore[arg-type]


def test_a_step_must_hold_every_decoding_row() -> None:
    with pytest.raises(WorkerConfigInvalid, match="max_step_tokens"):
        WorkerConfig(max_batch_size=64, max_step_tokens=63)
    with pytest.raises(WorkerConfigInvalid, match="max_chunk_tokens"):
        NativeWorkerConfig(max_chunk_tokens=0)


def test_a_chunk_is_the_configured_one_or_fits_the_device() -> None:
    assert {NativeWorkerConfig(device=device, max_chunk_tokens=7).chunk_tokens for device in ("cpu", "cuda")} == {7}
    assert NativeWorkerConfig(device="cpu").chunk_tokens == 192
    assert NativeWorkerConfig(device="cuda", max_step_tokens=4096).chunk_tokens == 4096


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"dtype": "float32"}])
def test_integer_weights_need_a_cpu_and_bfloat16(changes: dict[str, Any]) -> None:
    with pytest.raises(WorkerConfigInvalid, match="quantization 'int8' needs device 'cpu' and dtype 'auto' or"):
        NativeWorkerConfig(quantization="int8", **changes)
    assert NativeWorkerConfig(quantization="int4", dtype="bfloat16").quantization == "int4"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_bound_on_waiting_is_above_zero(seconds: float) -> None:
    with pytest.raises(WorkerConfigInvalid, match="max_wait_s"):
        WorkerConfig(max_wait_s=seconds)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_of_the_device_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(WorkerConfigInvalid, match=r"device_share must be (above 0|at most 1)"):
        WorkerConfig(device_share=share)
    assert WorkerConfig(device_share=1.0).device_share == 1


def test_the_longest_row_fits_the_kv_budget() -> None:
    with pytest.raises(WorkerConfigInvalid, match=r"kv_tokens must be at least max_model_len \(100\), got 99"):
        WorkerConfig(max_model_len=100, kv_tokens=99)
    assert WorkerConfig(max_model_len=100, kv_tokens=100).kv_tokens == 100


def test_a_gpu_computes_only_in_bfloat16() -> None:
    with pytest.raises(WorkerConfigInvalid, match="dtype must be 'auto' or 'bfloat16' with device 'cuda'"):
        WorkerConfig(device="cuda", dtype="float32")
    assert WorkerConfig(device="cpu", dtype="float32").dtype == "float32"


def test_only_vllm_has_rows_for_fusions_in_its_bank() -> None:
    assert NativeWorkerConfig(bank_rank_rows=1024).num_rank_rows == 1024
    default = VllmWorkerConfig(bank_rank_rows=1024)
    assert (default.num_fusion_rows, default.num_rank_rows) == (256, 1280)
    assert VllmWorkerConfig(bank_rank_rows=2048).num_fusion_rows == 512
    assert VllmWorkerConfig(bank_rank_rows=16, fusion_rank_rows=8).num_rank_rows == 24


def test_a_fusion_of_the_widest_adapters_that_fit_the_bank_fits_by_default() -> None:
    assert VllmWorkerConfig().num_fusion_rows == Limits().max_rank
    assert VllmWorkerConfig(bank_rank_rows=100).num_fusion_rows == 100
