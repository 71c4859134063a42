"""Sampling parameters that the settings give to requests without them."""

from __future__ import annotations

import pytest

from deployments.config.app import AppConfig
from deployments.config.parts import SamplingDefaults
from gpu_worker.front.request.request import SAMPLING_DEFAULTS, SamplingParams


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 0}, {"temperature": 2, "top_p": 1, "top_k": 2**31 - 1, "min_p": 1, "repetition_penalty": 100}],
    ids=str,
)
def test_sampling_defaults_reach_the_worker_and_are_valid_there(given: dict[str, float]) -> None:
    config = AppConfig.model_validate({"sampling_defaults": given})
    assert dict(config.worker_config().sampling_defaults) == given == config.served_model.sampling_defaults
    applied = SamplingParams(unset=frozenset(SAMPLING_DEFAULTS)).with_defaults(given)
    assert {name: getattr(applied, name) for name in given} == given


def test_every_parameter_that_a_base_model_may_set_is_a_setting() -> None:
    assert tuple(SamplingDefaults.model_fields) == SAMPLING_DEFAULTS
