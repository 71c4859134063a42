"""One job: its text, its stops, its limits, its stream, and its end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from gpu_worker.errors import DeadlineExceeded, EngineFull, PromptInvalid, PromptTooLong, SamplingInvalid
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams, TokenIds
from gpu_worker.front.text.token_bytes import TokenBytes
from tests.gpu_worker.conformance.driver import (
    EOS_ID,
    GREEDY,
    PATIENCE_S,
    HostedEngine,
    MakeAdapter,
    collect,
    job,
    tokens_of,
)
from tests.tiny import byte_tokenizer, plan_of

_BYTES = TokenBytes(byte_tokenizer().backend_tokenizer)
_IDS = {_BYTES(number): number for number in range(256)}
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True, logprobs=0)


def greedy(**changes: object) -> SamplingParams:
    return replace(GREEDY, **changes)  # type: ignore[arg-type]


def test_max_tokens_is_the_number_of_new_tokens(hosted: HostedEngine) -> None:
    for number in (1, 2, 31):
        [answer] = hosted.answers(job("count", sampling=greedy(max_tokens=number)))
        assert (answer.num_new_tokens, len(answer.logprobs), answer.finish_reason) == (number, number, "length")


def test_a_stop_id_ends_the_answer_without_its_text(hosted: HostedEngine) -> None:
    [whole] = hosted.answers(job("stop id"))
    tokens = tokens_of(whole)
    place = next(place for place, token in enumerate(tokens) if place and token not in tokens[:place])
    sampling = greedy(stop_token_ids=(_IDS[tokens[place]],))
    [answer] = hosted.answers(job("stop id", sampling=sampling))
    assert (answer.finish_reason, tokens_of(answer)) == ("stop", tokens[:place])
    assert answer.num_new_tokens == place + 1


def test_an_answer_that_repeats_itself_ends_only_if_it_was_asked_to(hosted: HostedEngine) -> None:
    one_token = greedy(logit_bias=((_IDS[b"a"], 100.0),), max_tokens=40, ignore_eos=True)
    [answer] = hosted.answers(job("again", sampling=replace(one_token, max_repeats=2)))
    assert (answer.text, answer.finish_reason) == ("a" * 24, "stop")
    [answer] = hosted.answers(job("again", sampling=one_token))
    assert (answer.text, answer.finish_reason) == ("a" * 40, "length")


def test_min_tokens_forbids_the_stop_ids_before_it(hosted: HostedEngine) -> None:
    [whole] = hosted.answers(job("minimum"))
    first = _IDS[tokens_of(whole)[0]]
    [answer] = hosted.answers(job("minimum", sampling=greedy(stop_token_ids=(first,), min_tokens=4)))
    assert answer.num_new_tokens >= 4
    assert tokens_of(whole)[0] not in tokens_of(answer)[:3]


@pytest.mark.parametrize("stops", [(), (_IDS[b"a"],)], ids=["no stop id", "another stop id"])
def test_min_tokens_forbids_no_end_id_that_is_ignored(stops: tuple[int, ...], hosted: HostedEngine) -> None:
    sampling = greedy(min_tokens=6, max_tokens=6, logit_bias=((EOS_ID, 100.0),), stop_token_ids=stops)
    [answer] = hosted.answers(job("unending", sampling=sampling))
    assert tokens_of(answer) == [b"<eos>"] * 6


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("stops", [(), (5,)], ids=["no stop id", "a stop id"])
def test_a_declared_end_id_outside_the_vocabulary_fails_no_job(
    stops: tuple[int, ...], ignore_eos: bool, hosted: HostedEngine
) -> None:
    sampling = greedy(min_tokens=3, max_tokens=3, stop_token_ids=stops, ignore_eos=ignore_eos)
    [answer] = hosted.answers(job("outside", sampling=sampling))
    assert answer.num_new_tokens == 3


def test_a_stop_string_ends_the_answer_before_it(hosted: HostedEngine) -> None:
    biased = greedy(max_tokens=12, logit_bias=((_IDS[b"a"], 90.0),), frequency_penalty=2.0)
    [whole] = hosted.answers(job("stop string", sampling=biased))
    assert whole.text.startswith("aaa")
    [answer] = hosted.answers(job("stop string", sampling=replace(biased, stop=("aaaaa",))))
    assert (answer.text, answer.finish_reason) == ("", "stop")
    [later] = hosted.answers(job("stop string", sampling=replace(biased, stop=("aaaaa",), min_tokens=7)))
    assert later.num_new_tokens >= 7


def test_text_offsets_of_log_probabilities_follow_the_text(hosted: HostedEngine) -> None:
    [answer] = hosted.answers(job("offsets", sampling=greedy(logit_bias=((_IDS[b"a"], 99.0),))))
    assert answer.text == "a" * 8
    assert [entry.text_offset for entry in answer.logprobs] == list(range(8))
    assert all(len(entry.top) == 20 for entry in answer.logprobs)


def test_log_probabilities_are_those_of_the_model_before_bias_and_temperature(hosted: HostedEngine) -> None:
    [plain] = hosted.answers(job("raw", sampling=greedy(max_tokens=1)))
    changed = greedy(max_tokens=1, logit_bias=((_IDS[b"a"], 99.0),), presence_penalty=1.0)
    [biased] = hosted.answers(job("raw", sampling=changed))
    assert biased.text == "a"
    for (token, logprob), (known, expected) in zip(biased.logprobs[0].top, plain.logprobs[0].top, strict=True):
        assert token == known
        assert abs(logprob - expected) < 1e-3


def test_only_a_seed_makes_sampling_repeatable_in_any_batch(hosted: HostedEngine, adapter: MakeAdapter) -> None:
    plan = plan_of("selection", (adapter(1), 1.0))
    seeded = job("seed", plan, replace(DRAWN, seed=7))
    [alone] = hosted.answers(seeded)
    others = [job("other", sampling=DRAWN)] * 3
    for answer in (hosted.answers(*others, seeded)[-1], hosted.answers(seeded, *others)[0]):
        assert tokens_of(answer) == tokens_of(alone)
    [other_seed] = hosted.answers(job("seed", plan, replace(DRAWN, seed=8)))
    assert tokens_of(other_seed) != tokens_of(alone)
    assert len({tuple(tokens_of(answer)) for answer in hosted.answers(*[job("n", sampling=DRAWN)] * 5)}) > 1


def test_a_low_temperature_takes_the_more_likely_of_two_close_tokens(hosted: HostedEngine) -> None:
    [known] = hosted.answers(job("close", sampling=greedy(max_tokens=1)))
    (best, highest), (other, lower) = known.logprobs[0].top[:2]
    closer = ((_IDS[other], highest - lower - 0.005),)
    cold = greedy(max_tokens=1, temperature=1e-4, logit_bias=closer)
    answers = hosted.answers(*[job("close", sampling=cold)] * 20)  # at 0.01 the other has 38 %
    assert [tokens_of(answer) for answer in answers] == [[best]] * 20


@pytest.mark.parametrize(
    ("extreme", "is_greedy"),
    [
        ({"top_k": 2**80}, False),
        ({"top_p": 1e-300}, True),
        ({"min_p": 1.0}, True),
        ({"temperature": 1e-300}, True),
        ({"temperature": 2.0, "top_k": 1}, True),
        ({"seed": 2**63 - 1}, False),
        ({"repetition_penalty": 100.0, "presence_penalty": -2.0, "frequency_penalty": 2.0}, False),
        ({"logit_bias": tuple((token, -100.0) for token in range(300)), "stop_token_ids": tuple(range(300))}, False),
    ],
    ids=["top_k", "top_p", "min_p", "cold", "hot", "seed", "penalties", "every token"],
)
def test_a_job_at_the_limits_of_sampling_leaves_its_neighbour_unchanged(
    extreme: dict[str, Any], is_greedy: bool, hosted: HostedEngine
) -> None:
    [known], [alone] = hosted.answers(job("extreme")), hosted.answers(job("neighbour"))
    answer, other = hosted.answers(job("extreme", sampling=replace(DRAWN, **extreme)), job("neighbour"))
    assert tokens_of(other) == tokens_of(alone)
    assert answer.num_new_tokens >= 1
    if is_greedy:
        assert tokens_of(answer)[:8] == tokens_of(known)


def test_a_stream_begins_with_a_heartbeat_and_ends_with_a_reason(hosted: HostedEngine) -> None:
    async def read() -> list[Delta | None]:
        return [delta async for delta in hosted.engine.stream(job("stream"), heartbeat_interval_s=5.0)]

    first, *others = hosted.run(read())
    assert first is None
    found = [delta for delta in others if delta is not None]
    [whole] = hosted.answers(job("stream"))
    assert Completion.joined(found).text == whole.text
    assert [delta.finish_reason for delta in found[:-1]] == [None] * (len(found) - 1)
    assert (found[-1].finish_reason, found[-1].num_new_tokens) == ("length", 8)


class SlowGrammars:
    """Stands in for the grammar compiler: every job waits for it until `may_end` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end = asyncio.Event()
        self.num_waiting = 0
        monkeypatch.setattr(RequestPreprocessor, "compile_grammar", self._compile)

    async def _compile(self, asked: Job) -> None:
        self.num_waiting += 1
        try:
            await self.may_end.wait()
        finally:
            self.num_waiting -= 1


def test_a_stream_gives_heartbeats_while_its_grammar_is_compiled(
    hosted: HostedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = SlowGrammars(monkeypatch)

    async def read() -> list[Delta | None]:
        async with asyncio.timeout(PATIENCE_S / 4), aclosing(hosted.engine.stream(job("slow"), 0.01)) as stream:
            assert [await anext(stream) for _ in range(4)] == [None] * 4
            grammars.may_end.set()
            return [delta async for delta in stream]

    found = [delta for delta in hosted.run(read()) if delta is not None]
    [whole] = hosted.answers(job("slow"))
    assert Completion.joined(found).text == whole.text


@pytest.mark.parametrize("is_queued", [False, True], ids=["while its grammar is compiled", "before it reads its text"])
def test_a_stream_that_is_left_early_is_not_answered_to_the_end(
    is_queued: bool, hosted: HostedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, num_before = SlowGrammars(monkeypatch), hosted.status().counters.num_new_tokens
    long = job("left", sampling=greedy(max_tokens=240, logprobs=None))

    async def leave() -> None:
        async with asyncio.timeout(PATIENCE_S / 4), aclosing(hosted.engine.stream(long, 0.01)) as stream:
            assert [await anext(stream) for _ in range(2)] == [None] * 2
            if is_queued:
                grammars.may_end.set()
                while not (await hosted.engine.status()).num_running:
                    await asyncio.sleep(0)
        while (status := await hosted.engine.status()).num_running + status.num_waiting + grammars.num_waiting:
            await asyncio.sleep(0.01)

    hosted.run(leave())
    assert hosted.status().counters.num_new_tokens - num_before < 240


def test_leaving_a_stream_frees_its_place_and_its_adapter(hosted: HostedEngine, adapter: MakeAdapter) -> None:
    weights = adapter(1)
    long = job("leave", plan_of("selection", (weights, 1.0)), sampling=greedy(max_tokens=200, logprobs=None))
    found = hosted.run(collect(hosted.engine, long, lambda found: len(found) == 1))
    assert found[-1].num_new_tokens < 200

    async def idle() -> int:
        while (status := await hosted.engine.status()).num_running:
            await asyncio.sleep(0.01)
        return status.num_running + status.num_waiting

    assert hosted.run(idle()) == 0
    assert hosted.run(hosted.engine.forget([weights.weights_digest]))


def test_cancelling_generate_cancels_its_jobs(hosted: HostedEngine) -> None:
    jobs = [job("cancel", sampling=greedy(max_tokens=200, logprobs=None))] * 12  # four of them wait

    async def cancel() -> None:
        task = asyncio.create_task(hosted.engine.generate(jobs))
        while not (await hosted.engine.status()).num_running:
            await asyncio.sleep(0)
        task.cancel()
        while (status := await hosted.engine.status()).num_running + status.num_waiting:
            await asyncio.sleep(0.01)

    hosted.run(cancel())


def test_a_deadline_ends_a_running_job(hosted: HostedEngine) -> None:
    endless = job("late", sampling=greedy(max_tokens=240, logprobs=None), time_left_s=0.02)
    error = hosted.error(endless)
    assert isinstance(error, DeadlineExceeded)
    assert error.num_new_tokens < 240
    assert isinstance(hosted.error(job("too late", time_left_s=-1.0)), DeadlineExceeded)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": ""}, None),
        ({"prompt": "x" * 400}, PromptTooLong),
        ({"sampling": greedy(max_tokens=300)}, PromptTooLong),
        ({"prompt": "\ud800"}, PromptInvalid),
        ({"sampling": greedy(logit_bias=((300, 1.0),))}, SamplingInvalid),
        ({"sampling": greedy(stop_token_ids=(-1,))}, SamplingInvalid),
        ({"prompt": (Message("user", "hi"),), "template": "none"}, PromptInvalid),
        *[({"prompt": TokenIds(ids)}, PromptInvalid) for ids in ((300,), (-1,), (1, 2**40))],
        ({"prompt": TokenIds((1,) * 300)}, PromptTooLong),
    ],
)
def test_a_job_that_cannot_be_computed_is_refused_alone(
    changes: dict[str, object], error: type[Exception] | None, hosted: HostedEngine
) -> None:
    asked = replace(job("refuse"), **changes)  # type: ignore[arg-type]
    outcome, neighbour = hosted.outcomes(asked, job("neighbour"))
    assert isinstance(neighbour, Completion)
    assert isinstance(outcome, Completion if error is None else error), outcome


def test_a_full_queue_refuses_the_tenant_with_the_most_jobs(hosted: HostedEngine) -> None:
    flood = [job("flood", sampling=greedy(max_tokens=2), tenant="flood")] * 80
    [*of_flood, of_other] = hosted.outcomes(*flood, job("other", sampling=greedy(max_tokens=2), tenant="other"))
    refused = [outcome for outcome in of_flood if isinstance(outcome, EngineFull)]
    assert refused and len(refused) + sum(isinstance(outcome, Completion) for outcome in of_flood) == len(of_flood)
    assert isinstance(of_other, Completion)


def test_tenants_take_turns(hosted: HostedEngine) -> None:
    """A tenant with one job is served before the queue of another tenant has ended."""
    long, short = (greedy(max_tokens=count, logprobs=None) for count in (60, 20))

    async def race() -> int:
        """Return how many jobs of the flood end while the single one waits and runs."""
        flood = [asyncio.create_task(hosted.engine.generate([job("flood", sampling=long)])) for _ in range(40)]
        while not (await hosted.engine.status()).num_waiting:
            await asyncio.sleep(0)
        num_before = sum(task.done() for task in flood)
        await hosted.engine.generate([job("single", sampling=short, tenant="single")])
        num_ended = sum(task.done() for task in flood) - num_before
        await asyncio.gather(*flood)
        return num_ended

    assert hosted.run(race()) < 30
