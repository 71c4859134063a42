"""Mixtures of experts, multimodal and hybrid models answer as transformers does with the adapters in its weights.

Needs vLLM. The outcomes for every family are in docs/reference/supported-models.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_worker.errors import BaseModelUnsupported
from tests.gpu_worker.conformance.driver import HostedEngine
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.families import SMALL, assert_equal, save
from tests.tiny import tiny_config


@pytest.mark.parametrize("family", SMALL)
def test_a_family_answers_every_kind_of_plan_as_the_reference(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    hosted = HostedEngine(ENGINES["vllm"], tiny_config(folder, engine="vllm", max_model_len=96))
    try:
        assert_equal(hosted, folder)
    finally:
        hosted.close()


def test_a_family_whose_window_vllm_reads_otherwise_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tiny_config(save(tmp_path, "cohere2"), engine="vllm", max_model_len=96)
    with pytest.raises(BaseModelUnsupported, match=r"cohere2: for prompts of 28 tokens its log probabilities differ"):
        HostedEngine(ENGINES["vllm"], config)
