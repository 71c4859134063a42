"""Which engine answers an offline run: the one that the settings name."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.batch.answering import PartAnswerer
from deployments.batch.offline import LoraRetriever
from deployments.batch.planning import PartPlanner
from deployments.config.app import AppConfig
from gpu_worker.config import VllmSettings
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.engine import NativeEngine
from lora_store import STRATEGIES
from tests.deployments.batching import TOPICS, TOPICS_OF, Place, prompts, publish, tiny_app
from tests.tiny import byte_tokenizer, gemma3_with_wide_heads, linear_shapes, tiny_config

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_refused_and_no_other_answers(pool: AppConfig) -> None:
    with pytest.raises(WorkerConfigInvalid, match=r"'vllm' needs the package vLLM.*docs/how-to/install\.md"):
        LoraRetriever(pool.model_copy(update={"worker": VllmSettings()}))


def test_the_native_engine_is_warmed_up_and_answers_from_any_event_loop(place: Place) -> None:
    run = place.begin(prompts(6))
    answerer = PartAnswerer(run)
    assert isinstance(answerer.named("").engine, NativeEngine) and answerer.named("").engine.loop.num_steps == 0
    try:
        planned = asyncio.run(PartPlanner(run).plan(run.parts[0]))
        assert asyncio.run(answerer.answer(planned)) == asyncio.run(answerer.answer(planned))
    finally:
        answerer.close()
    assert not answerer.named("").engine.health().is_alive


def wide_gemma3(folder: Path) -> Path:
    """Save a tiny model that vLLM serves."""
    torch.manual_seed(0)
    model = gemma3_with_wide_heads()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight  # tied to the head
        embeddings /= 8
        embeddings[256:] = 0  # no special token is ever chosen
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_one_process_answers_with_an_engine_of_each_kind(two_bases: AppConfig, tmp_path: Path) -> None:
    folder = wide_gemma3(tmp_path / "model")
    worker = tiny_app(folder, "unused", engine="vllm", enforce_eager=True, num_threads=1).worker
    native, second = two_bases.models
    models = (native, second.model_copy(update={"base_model": str(folder), "worker": worker}))
    config = AppConfig(models=models, store_uri=str(tmp_path / "pool"), retrieval=two_bases.retrieval)
    for model in models:
        name = model.served_base_name
        shapes = linear_shapes(load_base_model(tiny_config(Path(model.base_model))))
        publish(config, shapes, tmp_path / name, TOPICS_OF[name], base=name)
    texts = [f"Explain {topic}, please." for pair in zip(*TOPICS_OF.values(), strict=True) for topic in pair]
    asked: dict[str, Any] = {"as_is": True, "max_tokens": 6, "temperature": 0}
    with LoraRetriever(config) as offline:
        found = offline.generate(texts, **asked)
    assert [(answer.base_model, answer.error) for answer in found] == [("first", None), ("second", None)] * 2
    for name, own in config.by_model.items():
        with LoraRetriever(own) as alone:
            expected = alone.generate(texts, **asked)
        for answer, other in zip(found, expected, strict=True):
            assert answer.base_model != name or (answer.text, answer.adapters) == (other.text, other.adapters)


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllm_answers_a_batch_of_every_kind(tmp_path: Path) -> None:
    folder = wide_gemma3(tmp_path / "model")
    config = tiny_app(folder, str(tmp_path / "pool"), engine="vllm", enforce_eager=True, num_threads=1)
    publish(config, linear_shapes(load_base_model(tiny_config(folder))), tmp_path / "adapters", TOPICS[:5])
    place = Place(tmp_path, config)
    run = place.begin(prompts(12))
    answerer = PartAnswerer(run)
    try:
        assert type(answerer.named("").engine).__name__ == "VllmEngine"
        for part in run.parts:
            planned = asyncio.run(PartPlanner(run).plan(part))
            asyncio.run(answerer.answer(planned))
    finally:
        answerer.close()
    found = place.written()
    assert len(found) == 12 and [row["error"] for row in found] == [None] * 12
    assert {row["strategy"] for row in found} == set(STRATEGIES)
    assert all(row["num_new_tokens"] in (5, 6) for row in found)
