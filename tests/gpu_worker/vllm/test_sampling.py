"""A row's sampling parameters in vLLM's words, and vLLM's log probabilities in ours. Needs vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest

from gpu_worker.errors import SamplingInvalid
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.front.row import Row
from gpu_worker.model.base_model import BaseModel
from gpu_worker.vllm.sampling import probed_ids, prompt_scores, sampling_params, scored
from tests.tiny import TinyBase

GIVEN = SamplingParams(
    max_tokens=9,
    min_tokens=2,
    temperature=0.5,
    top_p=0.9,
    top_k=7,
    min_p=0.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    repetition_penalty=1.1,
    logit_bias=((3, 1.5),),
    logprobs=4,
    seed=11,
    stop=("end",),
    stop_token_ids=(5,),
)


@dataclass
class Entry:
    """A log probability as vLLM reports it."""

    logprob: float
    rank: int


def row_of(base: BaseModel, sampling: SamplingParams, **changes: Any) -> Row:
    prepare = RequestPreprocessor(base, 160)
    return prepare(Job("x", "prompt", sampling=sampling), lambda event: None, **changes)


def test_every_parameter_reaches_vllm(tiny_base: TinyBase) -> None:
    base = tiny_base()
    found = sampling_params(row_of(base, GIVEN), 300)
    same = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "logprobs", "seed")
    for name in (*same, "presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert getattr(found, name) == getattr(GIVEN, name), name
    assert found.logit_bias == {3: 1.5}
    assert set(found.stop_token_ids) == {5} | base.eos_token_ids
    assert not found.stop, "stop strings are looked for in the front end"
    assert found.logprob_token_ids is None
    unending = sampling_params(row_of(base, replace(GIVEN, ignore_eos=True)), 300)
    assert set(unending.stop_token_ids) == {5}
    assert sampling_params(row_of(base, replace(GIVEN, top_k=2**80)), 300).top_k == 300, "its messages hold 64 bits"


@pytest.mark.parametrize(("given", "expected"), [(1e-300, 0), (1e-4, 0), (0.0099, 0), (0.01, 0.01), (0.02, 0.02)])
def test_a_temperature_below_vllms_own_limit_is_greedy(given: float, expected: float, tiny_base: TinyBase) -> None:
    found = sampling_params(row_of(tiny_base(), replace(GIVEN, temperature=given)), 300)
    assert found.temperature == expected, "vLLM would draw with 0.01"


def test_a_temperature_above_vllms_own_limit_is_refused_by_name(tiny_base: TinyBase) -> None:
    base = tiny_base()
    assert sampling_params(row_of(base, replace(GIVEN, temperature=2.0)), 300).temperature == 2.0
    for above in (2.01, 100.0):
        with pytest.raises(SamplingInvalid, match=rf"temperature must be between 0 and 2 .* got {above:g}$"):
            sampling_params(row_of(base, replace(GIVEN, temperature=above)), 300)


def test_a_probe_asks_for_ids_spread_over_the_vocabulary(tiny_base: TinyBase) -> None:
    row = row_of(tiny_base(), SamplingParams(max_tokens=1), capture_first_logits=True)
    assert sampling_params(row, 300).logprob_token_ids == probed_ids(300)
    for size in (5, 128, 300, 262_144):
        ids = probed_ids(size)
        assert len(set(ids)) == len(ids) == min(size, 128)
        assert ids[0] == 0 and ids[-1] < size


def test_the_most_likely_ids_are_listed_best_first_without_the_chosen_one_beyond_them() -> None:
    found = {7: Entry(-0.1, 1), 3: Entry(-3.0, 3), 9: Entry(-2.0, 2), 40: Entry(-9.0, 17)}
    result = scored(40, found, 3)
    assert (result.logprob, result.top) == (-9.0, ((7, -0.1), (9, -2.0), (3, -3.0)))
    assert scored(7, {7: Entry(float("-inf"), 1)}, 0).top == ()
    assert scored(7, {7: Entry(float("-inf"), 1)}, 0).logprob == -9999.0


def test_each_token_of_the_prompt_but_the_first_has_its_score_and_rank(tiny_base: TinyBase) -> None:
    row = row_of(tiny_base(), replace(GIVEN, prompt_logprobs=1))
    tokens = row.tokens
    found = [None, *[{token: Entry(-3.0 - n, 40 + n), 290 + n: Entry(-0.5, 1)} for n, token in enumerate(tokens[1:])]]
    assert sampling_params(row, 300).prompt_logprobs == 1
    row.add_prompt_scores(prompt_scores(row, found))
    assert [entry.token_id for entry in row.prompt] == tokens
    assert [(entry.logprob, entry.rank) for entry in row.prompt[1:]] == [
        (-3.0 - n, 40 + n) for n in range(len(tokens) - 1)
    ]
    assert [[token for token, _, _ in entry.top] for entry in row.prompt[1:]] == [
        [290 + n] for n in range(len(tokens) - 1)
    ]
    assert not row.has_unsound_prompt
    unsound = row_of(tiny_base(), replace(GIVEN, prompt_logprobs=0))
    unsound.add_prompt_scores(prompt_scores(unsound, [None, *[{token: Entry(math.nan, 1)} for token in tokens[1:]]]))
    assert unsound.has_unsound_prompt
