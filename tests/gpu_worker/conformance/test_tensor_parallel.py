"""A base model that two processes share answers as the whole one does, adapters included. Needs vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_worker.conformance.driver import HostedEngine, MakeAdapter, Serve
from tests.gpu_worker.conformance.reference import Reference
from tests.gpu_worker.conformance.test_parity import assert_plans_follow, plans_of


@pytest.fixture
def hosted(model_folder: Path, serve: Serve) -> HostedEngine:
    return serve(model_folder, engine="vllm", tensor_parallel_size=2)


def test_every_kind_of_plan_equals_the_reference(
    hosted: HostedEngine, adapter: MakeAdapter, reference: Reference, tolerance: float
) -> None:
    """Each process has half of every layer's heads or columns, and so of each adapter's A or B."""
    assert_plans_follow(hosted, reference, plans_of(adapter), ["The parrot says"], tolerance)
