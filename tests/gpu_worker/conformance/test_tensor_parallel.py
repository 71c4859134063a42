"""A base model that two processes share answers as the whole one does, adapters included. Needs vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_store.adapter import AdapterWeights
from tests.gpu_worker.conformance.driver import HostedEngine, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.reference import Reference
from tests.gpu_worker.conformance.test_parity import NUM_NEW, assert_follows, plans_of
from tests.tiny import tiny_config

MakeAdapter = Callable[..., AdapterWeights]


@pytest.fixture
def hosted(model_folder: Path) -> Iterator[HostedEngine]:
    shared = {"engine": "vllm", "tensor_parallel_size": 2}
    engine = HostedEngine(ENGINES["vllm"], tiny_config(model_folder, max_model_len=256, **shared))
    yield engine
    engine.close()


def test_every_kind_of_plan_equals_the_reference(
    hosted: HostedEngine, adapter: MakeAdapter, reference: Reference, tolerance: float
) -> None:
    """Each process has half of every layer's heads or columns, and so of each adapter's A or B."""
    plans = plans_of(adapter)
    answers = hosted.answers(*[job("The parrot says", plan) for plan in plans.values()])
    for (name, plan), answer in zip(plans.items(), answers, strict=True):
        steps = reference.greedy("The parrot says", plan, hosted.pool, NUM_NEW)
        assert_follows(name, answer, steps, reference, tolerance)
