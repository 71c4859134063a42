"""The settings of a worker in vLLM's words. Needs vLLM."""

from __future__ import annotations

from typing import Literal

import pytest
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

from gpu_worker.config import WorkerConfig
from gpu_worker.vllm.engine_args import set_compilation, thread_variables

BIND, COUNT = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("num_threads", "size", "expected"),
    [
        (None, 1, {BIND: "2,3,6,7"}),
        (4, 1, {BIND: "2,3,6,7"}),
        (None, 2, {BIND: "2,6|3,7"}),
        (1, 1, {BIND: "nobind", COUNT: "1"}),
        (3, 2, {BIND: "nobind", COUNT: "1"}),
        (None, 8, {BIND: "nobind", COUNT: "1"}),
    ],
)
def test_only_an_engine_that_has_the_machine_binds_its_threads(
    num_threads: int | None, size: int, expected: dict[str, str]
) -> None:
    config = WorkerConfig(engine="vllm", num_threads=num_threads, tensor_parallel_size=size)
    assert thread_variables(config, [2, 3, 6, 7]) == expected


@pytest.mark.parametrize(
    ("device", "products", "is_compiled", "mode", "graphs"),
    [
        ("cpu", "auto", True, CompilationMode.DYNAMO_TRACE_ONCE, CUDAGraphMode.FULL),
        ("cpu", "auto", False, CompilationMode.NONE, CUDAGraphMode.FULL),
        ("cuda", "auto", True, CompilationMode.NONE, CUDAGraphMode.FULL),
        ("cuda", "torch", True, CompilationMode.NONE, CUDAGraphMode.NONE),
    ],
)
def test_graphs_are_captured_only_with_products_that_a_graph_can_replay(
    device: Literal["cpu", "cuda"],
    products: Literal["auto", "torch"],
    is_compiled: bool,
    mode: CompilationMode,
    graphs: CUDAGraphMode,
) -> None:
    compilation = CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.FULL)
    config = WorkerConfig(engine="vllm", device=device, lora_products=products)
    set_compilation(compilation, config, is_compiled=is_compiled)
    assert (compilation.mode, compilation.cudagraph_mode) == (mode, graphs)
