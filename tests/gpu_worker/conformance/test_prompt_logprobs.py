"""Log probabilities of the prompt's tokens, and prompts of token ids."""

from __future__ import annotations

from dataclasses import replace

import torch

from gpu_worker.front.request.request import Completion, Job, TokenIds
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.conformance.driver import GREEDY, HostedEngine, MakeAdapter, assert_same, job, tokens_of
from tests.gpu_worker.conformance.reference import Reference
from tests.tiny import plan_of

SCORED = replace(GREEDY, max_tokens=3, prompt_logprobs=4)


def assert_scores(answer: Completion, asked: Job, reference: Reference, hosted: HostedEngine, tolerance: float) -> None:
    """Check the prompt's scores against the float64 model: values, alternatives, ranks and offsets."""
    assert isinstance(asked.prompt, str)
    tokens = reference.tokens_of(asked.prompt)
    expected = reference.prompt_logprobs(tokens, asked.plan, hosted.pool)
    assert [entry.token_id for entry in answer.prompt] == tokens
    first, *others = answer.prompt
    assert (first.logprob, first.rank, first.top) == (None, None, ())
    for entry, logprobs in zip(others, expected, strict=True):
        assert entry.logprob is not None and entry.rank is not None
        assert entry.token == reference.token_bytes(entry.token_id)
        assert abs(entry.logprob - float(logprobs[entry.token_id])) < tolerance
        larger, no_smaller = (
            int((logprobs > logprobs[entry.token_id] + slack).sum()) for slack in (tolerance, -tolerance)
        )
        assert larger < entry.rank <= no_smaller
        best = logprobs.topk(4).values
        assert torch.tensor([value for _, _, value in entry.top]).double().sub(best).abs().max() < tolerance
        assert all(abs(float(logprobs[token_id]) - value) < tolerance for token_id, _, value in entry.top)
    text = asked.prompt.encode()
    assert [entry.text_offset for entry in others] == list(range(len(text))), "the tokenizer has a token for each byte"


def test_each_row_of_a_batch_is_scored_as_by_the_slow_model_with_its_own_adapters(
    hosted: HostedEngine, adapter: MakeAdapter, reference: Reference, tolerance: float
) -> None:
    """Prompts of several chunks and of one token, alone and together with decoding rows, with every kind of plan."""
    one, other = adapter(1), adapter(2)
    plans = [
        BASE_PLAN,
        plan_of("selection", (one, 1.0)),
        plan_of("mixture", (one, 0.7), (other, 0.3)),
        plan_of("fusion", (one, 0.5), (other, 0.5)),
        BASE_PLAN,
    ]
    texts = ["base " * 20, "selected " * 9, "mixed " * 15, "fused text", "x"]
    scored = [job(text, plan, SCORED) for text, plan in zip(texts, plans, strict=True)]
    free = [job("free " * 12, plans[1]), job("free", plans[2])]
    together = hosted.answers(*scored, *free)
    for answer, asked in zip(together, scored, strict=False):
        assert_scores(answer, asked, reference, hosted, tolerance)
    assert [answer.prompt for answer in together[len(scored) :]] == [(), ()]
    assert_same(together[len(scored) :], hosted.answers(*free), tolerance)
    unscored = [replace(each, sampling=replace(SCORED, prompt_logprobs=None)) for each in scored]
    assert_same(together[: len(scored)], hosted.answers(*unscored), tolerance)


def test_without_new_tokens_only_the_prompt_is_computed(
    hosted: HostedEngine, adapter: MakeAdapter, reference: Reference, tolerance: float
) -> None:
    plan = plan_of("selection", (adapter(3), 1.0))
    asked = job("nothing new " * 5, plan, replace(SCORED, max_tokens=0))
    [answer] = hosted.answers(asked)
    assert (answer.text, answer.num_new_tokens, answer.finish_reason, answer.logprobs) == ("", 0, "length", ())
    assert_scores(answer, asked, reference, hosted, tolerance)
    [empty] = hosted.answers(job("no scores", sampling=replace(GREEDY, max_tokens=0)))
    assert (empty.text, empty.num_new_tokens, empty.prompt) == ("", 0, ())


def test_token_ids_are_the_prompt_as_they_are_under_any_plan(
    hosted: HostedEngine, adapter: MakeAdapter, reference: Reference, tolerance: float
) -> None:
    plan, ids = plan_of("selection", (adapter(4), 1.0)), reference.tokens_of("as token ids")
    whole = TokenIds(tuple(ids))
    asked = [
        job("as token ids"),
        job("as token ids", plan),
        job(whole),
        job(whole, plan),
        job(TokenIds(tuple(ids[1:]))),
    ]
    text, adapted, tokens, adapted_tokens, bare = hosted.answers(*asked)
    assert_same([tokens, adapted_tokens], [text, adapted], tolerance)
    assert (tokens.num_prompt_tokens, bare.num_prompt_tokens) == (len(ids), len(ids) - 1), "nothing is added"
    assert tokens_of(bare) != tokens_of(text) or bare.logprobs != text.logprobs
