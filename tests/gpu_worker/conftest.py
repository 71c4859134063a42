"""Fixtures of the worker's tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

import pytest

from gpu_worker.base_model import BaseModel
from gpu_worker.engine import Engine
from gpu_worker.loader import Fetch
from gpu_worker.request import Job
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.driving import Answer, run_together
from tests.tiny import InlineExecutor, linear_shapes, tiny_config


@pytest.fixture
def make_engine(tiny_folders: Mapping[str, Path], tiny_base: Callable[..., BaseModel]) -> Callable[..., Engine]:
    """An engine over a tiny model that loads the given adapters; free bank rows hold NaN."""

    def make(
        adapters: Mapping[str, AdapterWeights] | Fetch,
        family: str = "gemma3",
        *,
        base: BaseModel | None = None,
        executor: Executor | None = None,
        **changes: object,
    ) -> Engine:
        return Engine(
            tiny_config(tiny_folders[family], **changes),
            adapters.__getitem__ if isinstance(adapters, Mapping) else adapters,
            base=base or tiny_base(family),
            executor=executor or InlineExecutor(),
            free_fill=float("nan"),
        )

    return make


@pytest.fixture
def shapes(tiny_base: Callable[..., BaseModel]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module of the tiny gemma3 model that an adapter may target."""
    return linear_shapes(tiny_base())


@pytest.fixture
def alone(make_engine: Callable[..., Engine]) -> Callable[[Job, Mapping[str, AdapterWeights]], Answer]:
    """The job's answer from a fresh engine that serves nothing else."""

    def run(job: Job, adapters: Mapping[str, AdapterWeights]) -> Answer:
        [answer] = run_together(make_engine(adapters), [job])
        return answer

    return run
