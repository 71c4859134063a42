"""The engines that are installed here."""

from __future__ import annotations

import importlib.util

from gpu_worker.bank.loader import Fetch
from gpu_worker.config import WorkerConfig
from gpu_worker.native.engine import NativeEngine
from tests.gpu_worker.conformance.driver import StartEngine


async def start_native(config: WorkerConfig, fetch: Fetch, *, free_fill: float) -> NativeEngine:
    return NativeEngine.start(config, fetch, stream_interval_ms=0, free_fill=free_fill)


ENGINES: dict[str, StartEngine] = {"native": start_native}
if importlib.util.find_spec("vllm") is not None:
    from gpu_worker.vllm.engine import VllmEngine

    async def start_vllm(config: WorkerConfig, fetch: Fetch, *, free_fill: float) -> VllmEngine:
        return await VllmEngine.start(config, fetch, stream_interval_ms=0, free_fill=free_fill, is_compiled=False)

    ENGINES["vllm"] = start_vllm
