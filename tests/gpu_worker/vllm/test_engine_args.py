"""The settings of a worker in vLLM's words. Needs vLLM."""

from __future__ import annotations

import pytest

from gpu_worker.config import WorkerConfig
from gpu_worker.vllm.engine_args import thread_variables

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
