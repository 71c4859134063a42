"""Base models whose layers vLLM names otherwise than adapters do answer as the reference. Needs vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import AdapterUnfit
from gpu_worker.vllm.front_model import FrontModel, load_front_model
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.conformance.driver import HostedEngine, MakeAdapter, assert_same, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.gpu_worker.conformance.families import save
from tests.gpu_worker.conformance.reference import Reference
from tests.gpu_worker.conformance.test_parity import assert_plans_follow
from tests.tiny import plan_of, random_adapter, tiny_config

# vLLM divides what is one `gate_up_proj` for adapters of the first. It serves the second with its class for any model
# of transformers, which has all layers below `model`.
FAMILIES = {"glm4": "model.layers.0.mlp.gate_up_proj", "gpt_neox": "gpt_neox.layers.0.attention.query_key_value"}
NOWHERE = "model.layers.0.nowhere"


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(family), family)


def load_with_nowhere(config: VllmWorkerConfig) -> FrontModel:
    """Read the model, and believe in a module that no worker has."""
    model = load_front_model(config)
    return replace(model, shapes={**model.shapes, NOWHERE: (128, 128)}, paths={**model.paths, NOWHERE: NOWHERE})


@pytest.fixture(scope="module")
def own_engine(folder: Path) -> Iterator[HostedEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu_worker.vllm.engine.load_front_model", load_with_nowhere)
        engine = HostedEngine(ENGINES["vllm"], tiny_config(folder, engine="vllm"))
    yield engine
    engine.close()


@pytest.fixture
def hosted(own_engine: HostedEngine) -> HostedEngine:
    return own_engine


def test_a_module_that_the_workers_lack_at_the_start_takes_no_adapters(hosted: HostedEngine, family: str) -> None:
    assert NOWHERE not in hosted.engine.module_shapes and FAMILIES[family] in hosted.engine.module_shapes


def test_adapters_of_layers_with_other_names_equal_the_reference(
    hosted: HostedEngine, adapter: MakeAdapter, folder: Path, family: str, tolerance: float
) -> None:
    one, other = adapter(1), adapter(2, rank=3, modules=lambda name: ".1." in name)
    parts = (one, 0.5), (other, 0.7)
    plans = {
        "base": BASE_PLAN,
        "selection": plan_of("selection", (one, 1.0)),
        "an adapter of one layer": plan_of("selection", (other, 1.0)),
        "mixture": plan_of("mixture", *parts),
        "fusion": plan_of("fusion", *parts),
    }
    assert_plans_follow(hosted, Reference(folder), plans, ["The parrot says"], tolerance)


def test_an_adapter_of_a_module_that_the_workers_lack_fails_alone(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    """The front end is made to believe in it again."""
    plans = [plan_of("selection", (adapter(1), 1.0)), BASE_PLAN]
    before = hosted.answers(*[job("The parrot says", plan) for plan in plans])
    shapes = cast("dict[str, tuple[int, int]]", hosted.engine.module_shapes)
    shapes[NOWHERE] = (128, 128)
    try:
        unfit = random_adapter(shapes, seed=9)
        hosted.add(unfit)
        unfit_plan = plan_of("selection", (unfit, 1.0))
        for _ in range(2):
            asked = [job("The parrot says", plan) for plan in (*plans, unfit_plan)]
            *answers, refused = hosted.outcomes(*asked)
            assert isinstance(refused, AdapterUnfit) and f"no module '{NOWHERE}' in vLLM" in str(refused)
            assert_same([answer for answer in answers if not isinstance(answer, Exception)], before, tolerance)
        assert hosted.engine.health().is_alive
    finally:
        del shapes[NOWHERE]
    hosted.forget_all()
