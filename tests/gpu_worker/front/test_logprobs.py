"""Log probabilities, compared with a slow loop, alone and in batches, and the tokens that they are reported for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpu_worker.errors import SamplingInvalid
from gpu_worker.front.draw import Draw
from gpu_worker.front.logprobs import Scored
from gpu_worker.front.request.request import Delta, Job, SamplingParams, TokenLogprob
from gpu_worker.front.text.token_bytes import TokenBytes
from gpu_worker.native.engine import NativeEngine
from gpu_worker.native.sampling.sampling import Sampler
from gpu_worker.native.sampling.sampling_kernel import load_sampling_kernel
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.engine_driver import Answer, MakeEngine, Shapes, compiled, complete, run, run_together
from tests.gpu_worker.slow_sampling import scored_slowly
from tests.tiny import byte_tokenizer, plan_of, random_adapter

BYTES = byte_tokenizer().backend_tokenizer


def logits_of(seed: int, size: int = 12) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(params=["kernel", "torch"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return Sampler(compiled(load_sampling_kernel) if request.param == "kernel" else None)


def scores_of(sampler: Sampler, logits: Tensor, wanted: list[int | None]) -> list[Scored | None]:
    """Return the scores of the most likely token of each row."""
    return sampler(logits, [Draw(SamplingParams(temperature=0, logprobs=count), 0, 0) for count in wanted])[1]


@pytest.mark.parametrize("count", [0, 1, 5, 12, 20])
def test_scores_are_the_log_softmax_of_the_models_own_logits(count: int, sampler: Sampler) -> None:
    logits = torch.stack([logits_of(seed) for seed in range(4)])
    params = SamplingParams(logprobs=count, temperature=3.0, presence_penalty=2.0, logit_bias=((2, 4.0),))
    draws = [Draw(params, seed, 9, (), [1, 2, 3], 1) for seed in range(4)]
    tokens, scores = sampler(logits, draws)
    for row, (token, scored) in enumerate(zip(tokens, scores, strict=True)):
        assert scored is not None and token is not None
        logprob, top = scored_slowly(logits[row], token, count)
        assert scored.logprob == pytest.approx(logprob, abs=1e-5)
        assert [i for i, _ in scored.top] == [i for i, _ in top]
        assert [value for _, value in scored.top] == pytest.approx([value for _, value in top], abs=1e-5)


def test_only_rows_with_a_request_and_a_token_are_scored(sampler: Sampler) -> None:
    logits = torch.stack([logits_of(seed) for seed in range(3)])
    logits[1] = math.nan
    assert [item is None for item in scores_of(sampler, logits, [None, 3, 3])] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_tokens_have_their_score_and_their_place_among_all_ids(sampler: Sampler, dtype: torch.dtype) -> None:
    logits = torch.stack([logits_of(seed, 2000).round() for seed in range(9)]).to(dtype)  # with many equal ones
    logits[7, 5], logits[8, 6] = math.nan, math.inf
    tokens, counts = [3, 0, 1999, 7, 500, 11, 12, 13, 14], [0, 5, 2, 0, 20, 1, 1, 1, 1]
    found = sampler.score(logits, tokens, counts)
    assert found[7:] == [None, None]
    for row, (token, count) in enumerate(zip(tokens[:7], counts[:7], strict=True)):
        scored, values = found[row], logits[row].tolist()
        assert scored is not None
        logprob, top = scored_slowly(logits[row], token, count)
        assert scored.rank == 1 + sum((-value, i) < (-values[token], token) for i, value in enumerate(values))
        assert scored.logprob == pytest.approx(logprob, abs=1e-5)
        assert [i for i, _ in scored.top] == [i for i, _ in top]
        assert [value for _, value in scored.top] == pytest.approx([value for _, value in top], abs=1e-5)


def test_equal_logits_are_listed_by_id(sampler: Sampler) -> None:
    logits = torch.zeros(1, 3000)
    logits[0, [2900, 5, 700]] = 1.0
    [scored] = scores_of(sampler, logits, [5])
    assert scored is not None and [token for token, _ in scored.top] == [5, 700, 2900, 0, 1]


def test_impossible_tokens_have_a_finite_number(sampler: Sampler) -> None:
    [scored] = scores_of(sampler, torch.tensor([[0.0, -math.inf]]), [2])
    assert scored is not None and scored.top == ((0, 0.0), (1, -9999.0))


def reported(answer: Answer) -> list[TokenLogprob]:
    return [entry for event in answer.events if isinstance(event, Delta) for entry in event.logprobs]


def test_a_batch_equals_each_row_alone(make_engine: MakeEngine, shapes: Shapes) -> None:
    adapter = random_adapter(shapes, 1)
    pool = {adapter.weights_digest: adapter}
    jobs = [
        Job(
            str(number),
            "one " * (number + 1),
            plan_of("mixture", (adapter, 0.5)) if number % 2 else BASE_PLAN,
            SamplingParams(max_tokens=6, seed=number, logprobs=wanted, ignore_eos=True, presence_penalty=number / 4),
        )
        for number, wanted in enumerate([None, 0, 3, 20, None])
    ]
    together = run_together(make_engine(pool), jobs)
    for job, answer in zip(jobs, together, strict=True):
        [alone] = run_together(make_engine(pool), [job])
        assert answer.tokens == alone.tokens
        entries, expected = reported(answer), reported(alone)
        wanted = job.sampling.logprobs
        assert len(entries) == (0 if wanted is None else len(answer.tokens))
        for entry, other, token in zip(entries, expected, answer.tokens, strict=bool(entries)):
            assert (entry.token, entry.text_offset) == (other.token, other.text_offset)
            assert entry.token == TokenBytes(BYTES)(token)
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(entry.top) == wanted
            assert [value for _, value in entry.top] == pytest.approx([v for _, v in other.top], abs=1e-4)


def test_merged_deltas_report_all_their_tokens(make_engine: MakeEngine, start: Callable[..., NativeEngine]) -> None:
    job = Job("1", "x", BASE_PLAN, SamplingParams(max_tokens=20, temperature=0, logprobs=1, ignore_eos=True))
    [answer] = run_together(make_engine({}), [job])
    native = start(make_engine({}), stream_interval_ms=20.0)
    completion, _ = run(complete(native, job))
    assert [entry.token for entry in completion.logprobs] == [entry.token for entry in reported(answer)]
    assert len(completion.logprobs) == 20


def test_a_bias_for_an_invalid_id_is_refused(make_engine: MakeEngine) -> None:
    prepare = make_engine({}).prepare
    with pytest.raises(SamplingInvalid, match=r"logit_bias must have ids from 0 to .*, got 300"):
        prepare(Job("1", "x", sampling=SamplingParams(logit_bias=((300, 1.0),))), lambda event: None)
