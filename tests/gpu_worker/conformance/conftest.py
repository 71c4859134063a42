"""The engines under test. Those that are not installed are not collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_store.adapter import AdapterWeights
from tests.gpu_worker.chat_templates import MISTRAL_TEMPLATE
from tests.gpu_worker.conformance.driver import MARKER, TURN_END, TURN_END_ID, HostedEngine, Serve, StartEngine
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.reference import Reference
from tests.tiny import byte_tokenizer, change_json, gemma3_with_wide_heads, random_adapter, tiny_config

_NEED_VLLM = ["child_processes", "experts", "families", "module_names", "tensor_parallel"]
collect_ignore = [] if "vllm" in ENGINES else [f"test_{name}.py" for name in _NEED_VLLM]
BANK_ROWS = 16  # four adapters of rank 4
FUSION_ROWS = 12  # two fusions of rank 5, or three of rank 4
# Largest difference of a log probability from the float64 reference, and between batches.
TOLERANCE = {"native": 1e-4, "vllm": 1e-3}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Gemma-3 that both engines can serve, with a special token for calls and two that end answers.

    Its files declare an end id outside its vocabulary of 300 too.
    """
    torch.manual_seed(0)
    model = gemma3_with_wide_heads()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight  # tied to the head
        embeddings /= 8  # otherwise the model repeats the last token, whatever its layers compute
        embeddings[256:] = 0  # no special token is ever chosen
    folder = tmp_path_factory.mktemp("conformance")
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [MARKER, TURN_END]})
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tokenizer.save_pretrained(folder)
    change_json(folder / "generation_config.json", {"eos_token_id": [257, TURN_END_ID, 300]})
    return folder


@pytest.fixture(scope="session", params=list(ENGINES))
def session_engine(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[HostedEngine]:
    sizes = {"bank_rank_rows": BANK_ROWS, "max_batch_size": 8, "max_step_tokens": 64, "max_waiting": 64}
    if request.param == "vllm":
        sizes["fusion_rank_rows"] = FUSION_ROWS
    config = tiny_config(model_folder, engine=request.param, max_model_len=256, **sizes)
    hosted = HostedEngine(ENGINES[request.param], config)
    yield hosted
    hosted.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a starter of engines over a folder, which end with the test."""
    started: list[HostedEngine] = []

    def start(folder: Path, by: StartEngine | None = None, **changes: Any) -> HostedEngine:
        config = tiny_config(folder, **changes)
        started.append(HostedEngine(by or ENGINES[config.engine], config))
        return started[-1]

    yield start
    for hosted in started:
        hosted.close()


@pytest.fixture
def hosted(session_engine: HostedEngine) -> Iterator[HostedEngine]:
    """Return an engine that holds no adapter. A test must leave it idle."""
    yield session_engine
    session_engine.forget_all()
    status = session_engine.status()
    assert (status.num_running, status.num_waiting, status.occupied_rows, status.host_cache_bytes) == (0, 0, 0, 0)


@pytest.fixture
def tolerance(hosted: HostedEngine) -> float:
    return TOLERANCE[hosted.config.engine]


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Reference:
    return Reference(model_folder)


@pytest.fixture
def adapter(hosted: HostedEngine) -> Callable[..., AdapterWeights]:
    """Make a random adapter of every module, or some, and put it into the engine's pool."""

    def make(seed: int, **changes: object) -> AdapterWeights:
        weights = random_adapter(hosted.engine.module_shapes, seed, **changes)
        hosted.add(weights)
        return weights

    return make
