"""The limits of a request."""

from __future__ import annotations

import math
import pickle

import pytest

from gpu_worker.errors import SamplingInvalid
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import (
    MAX_BIASED_IDS,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    Completion,
    Delta,
    Job,
    SamplingParams,
    TokenLogprob,
)
from gpu_worker.front.request.tools import Function, ToolCall, ToolCallPiece, Tools


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0),
        ("max_repeats", -1),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, 1.0),) * (MAX_BIASED_IDS + 1)),
        ("logprobs", MAX_LOGPROBS + 1),
        ("logprobs", -1),
        ("prompt_logprobs", MAX_LOGPROBS + 1),
        ("prompt_logprobs", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("x",) * (MAX_STOPS + 1)),
        ("stop", ("",)),
        ("stop", ("x" * (MAX_STOP_CHARS + 1),)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(parameter: str, value: object) -> None:
    with pytest.raises(SamplingInvalid, match=parameter) as caught:
        SamplingParams(**{parameter: value})  # type: ignore[arg-type]
    assert caught.value.param == parameter


def test_min_tokens_must_fit_max_tokens() -> None:
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    with pytest.raises(SamplingInvalid, match=r"min_tokens must be between 0 and max_tokens \(3\), got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 1},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.01},
        {"logit_bias": ((0, -100.0), (1, 100.0)), "logprobs": MAX_LOGPROBS},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"stop": ("x" * MAX_STOP_CHARS,) * MAX_STOPS},
    ],
)
def test_the_limits_themselves_are_allowed(changes: dict[str, object]) -> None:
    SamplingParams(**changes)  # type: ignore[arg-type]


def test_the_base_models_values_replace_only_what_the_client_left_unset() -> None:
    own = {"temperature": 0.6, "top_k": 64, "top_p": 0.95}
    asked = SamplingParams(top_p=0.5, unset=frozenset({"temperature", "top_k", "min_p"}))
    found = asked.with_defaults(own)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.6, 64, 0.5, 0.0)
    assert asked.with_defaults({}) is asked and SamplingParams().with_defaults(own) == SamplingParams()


def test_a_job_and_its_answer_survive_pickling() -> None:
    """They travel between replicas with everything that a request may ask for."""
    sampling = SamplingParams(stop=("a",), seed=3, logprobs=1, grammar=Grammar("regex", "a+"))
    job = Job("1", "text", sampling=sampling, tools=Tools((Function("f", "", "{}"),), required=True))
    tokens = (TokenLogprob(b"\xc3", -0.5, ((b"\xc3", -0.5),), 0),)
    delta = Delta("a", 5, 3, "tool_calls", logprobs=tokens, tool_calls=(ToolCallPiece(0, "{}", "c1", "f"),), stop="a")
    assert pickle.loads(pickle.dumps((job, delta))) == (job, delta)


def test_an_answer_has_the_calls_of_all_its_deltas() -> None:
    deltas = [
        Delta("Hm", 5, 1),
        Delta("", 5, 2, tool_calls=(ToolCallPiece(0, "", "c1", "f"), ToolCallPiece(0, "{"))),
        Delta("", 5, 3, "tool_calls", tool_calls=(ToolCallPiece(0, "}"),)),
    ]
    assert Completion.joined(deltas) == Completion("Hm", 5, 3, "tool_calls", tool_calls=(ToolCall("c1", "f", "{}"),))
