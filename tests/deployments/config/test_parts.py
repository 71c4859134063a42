"""Sampling parameters that the settings give to requests without them, and the least queue of an encoder."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from deployments.api.completions import MAX_QUERIES
from deployments.config.app import AppConfig
from deployments.config.parts import RetrievalSettings, SamplingDefaults
from gpu_worker.front.request.request import SAMPLING_DEFAULTS, SamplingParams
from retriever_svc.views import LONG_CHARS, split_views


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


def test_every_queue_of_an_encoder_holds_one_request_of_the_most_texts() -> None:
    views = split_views("\n\n".join(letter * LONG_CHARS for letter in "abcd"))
    num_texts = MAX_QUERIES * len(views)
    assert RetrievalSettings(max_waiting=num_texts).max_waiting == num_texts == MAX_QUERIES * 5
    with pytest.raises(ValidationError, match="max_waiting"):
        RetrievalSettings(max_waiting=num_texts - 1)
