"""Start the engine that the settings name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import Executor

from gpu_worker.bank.loader import Fetch
from gpu_worker.config import NativeWorkerConfig, VllmWorkerConfig
from gpu_worker.engine import InferenceEngine
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.front.cpu_count import with_threads
from gpu_worker.native.engine import NativeEngine


async def start_engine(
    config: NativeWorkerConfig | VllmWorkerConfig,
    fetch: Fetch,
    *,
    executor: Executor | None = None,
    stream_interval_ms: float = 25.0,
    niceness: int = 0,
    reports_to_ray: bool = False,
    is_installed: Callable[[str], bool] = lambda package: importlib.util.find_spec(package) is not None,
) -> InferenceEngine:
    """Start the engine of this configuration. Call it within the event loop that will use the engine.

    Without `num_threads` in the settings the engine computes with one thread for each CPU that the process may use.
    `niceness`: of the native engine's thread. The thread that tokenizes comes after it.
    `reports_to_ray`: whether vLLM's own metrics go to Ray's exporter.
    Raises: BaseModelUnsupported, WorkerConfigInvalid, WarmUpFailed.
    """
    config = with_threads(config)
    if isinstance(config, NativeWorkerConfig):
        return NativeEngine.start(
            config, fetch, executor=executor, stream_interval_ms=stream_interval_ms, niceness=niceness
        )
    if not is_installed("vllm"):
        raise WorkerConfigInvalid(
            "engine 'vllm' needs the package vLLM, which is not installed; see docs/how-to/install.md, or use engine"
            " 'native'"
        )
    from gpu_worker.vllm.engine import VllmEngine  # imports vLLM, which takes seconds

    loggers: list[type] = []
    if reports_to_ray:
        from gpu_worker.vllm.ray_metrics import PlanStatLogger

        loggers = [PlanStatLogger]
    return await VllmEngine.start(
        config,
        fetch,
        executor=executor,
        stream_interval_ms=stream_interval_ms,
        niceness=niceness,
        stat_loggers=loggers,
    )
