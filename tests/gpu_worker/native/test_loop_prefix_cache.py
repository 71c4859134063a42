"""The prefix cache of the engine: answers equal those without it, and only equal compositions of a tenant share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu_worker.errors import GrammarFailed
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.native.attention.kv_cache import KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.engine_driver import (
    Alone,
    Answer,
    MakeEngine,
    Shapes,
    ask,
    assert_nothing_held,
    assert_same,
    by_digest,
    greedy,
    only,
    run_together,
)
from tests.gpu_worker.poisoned_cache import Poisoned
from tests.gpu_worker.slow_varlen_attention import slow_varlen_attn
from tests.soak import Scale
from tests.tiny import plan_of, random_adapter

PAGE = 16
PROMPT = "a system prompt that all of these requests begin with, of eighty tokens or so; "  # one token per byte
QUESTIONS = ["", "what?", "where is it, and why is it unknown?", "what? and when?"]
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)


def on_device(shape: KvShape) -> DeviceKvCache:
    return DeviceKvCache(shape, torch.device("cpu"), slow_varlen_attn)


def job_of(question: str, plan: Plan = BASE_PLAN, sampling: SamplingParams = GREEDY, **changes: object) -> Job:
    return replace(Job(question, PROMPT + question, plan, sampling), **changes)  # type: ignore[arg-type]


def logprobs_of(answer: Answer) -> list[tuple[bytes, float]]:
    deltas = [event for event in answer.events if isinstance(event, Delta)]
    return [(entry.token, entry.logprob) for delta in deltas for entry in delta.logprobs]


MODES: dict[str, tuple[SamplingParams, dict[str, object]]] = {
    "greedy": (GREEDY, {}),
    "seeds": (SAMPLED, {}),
    "penalties and log probabilities": (
        replace(SAMPLED, frequency_penalty=0.7, repetition_penalty=1.2, logprobs=3),
        {},
    ),
    "a grammar": (
        SamplingParams(max_tokens=24, temperature=1.0, seed=3, grammar=Grammar("regex", "[a-h]{3,9}-[0-9]{2}")),
        {},
    ),
    "preemption": (GREEDY, {"kv_tokens": 272, "max_batch_size": 4}),
    "chunks": (GREEDY, {"max_step_tokens": 19, "max_chunk_tokens": 5}),
    "torch, and NaN in free pages": (GREEDY, {"build_kv_cache": Poisoned}),
    "NaN, preemption and chunks": (
        GREEDY,
        {"build_kv_cache": Poisoned, "kv_tokens": 272, "max_step_tokens": 24, "max_batch_size": 4},
    ),
    "pages on a device": (GREEDY, {"build_kv_cache": on_device, "lora_products": "torch"}),
    "a small cache": (GREEDY, {"prefix_cache_share": 0.1}),
}


@pytest.mark.parametrize(
    ("mode", "family"), [*[(mode, "gemma3") for mode in MODES], ("greedy", "llama"), ("pages on a device", "llama")]
)
def test_answers_with_the_cache_equal_those_without(
    mode: str, family: str, make_engine: MakeEngine, shapes: Shapes
) -> None:
    """Eight rows, twice: the second time nearly all of their prompts are in the cache."""
    sampling, settings = MODES[mode]
    pool = [random_adapter(shapes, seed, rank=3) for seed in (1, 2)]
    plans = [BASE_PLAN, plan_of("mixture", (pool[0], 0.7), (pool[1], 0.4))]
    settings = {"max_model_len": 272, "kv_tokens": 272 * 4} | settings
    jobs = [job_of(question, plan, sampling) for plan in plans for question in QUESTIONS]
    engine = make_engine(by_digest(*pool), family, **settings)
    plain = make_engine(by_digest(*pool), family, prefix_cache=False, **settings)
    expected = run_together(plain, jobs)
    for _ in range(2):
        before = engine.counters.num_cached_tokens
        for answer, other in zip(run_together(engine, jobs), expected, strict=True):
            assert_same(answer, other)
            for (token, logprob), (own, own_logprob) in zip(logprobs_of(answer), logprobs_of(other), strict=True):
                assert token == own and logprob == pytest.approx(own_logprob, abs=1e-3)
    assert engine.counters.num_cached_tokens > before
    assert plain.counters.num_cached_tokens == plain.kv_cache.num_cached_tokens == 0
    assert (engine.counters.num_preemptions > 0) == ("preemption" in mode)
    if "build_kv_cache" not in settings:
        assert_nothing_held(engine)


def test_a_tenant_does_not_wait_for_a_prompt_of_another(make_engine: MakeEngine) -> None:
    engine = make_engine({}, max_step_tokens=16)
    first = ask(engine, job_of("what?", tenant="acme"))
    engine.step()
    own, other = ask(engine, job_of("why?", tenant="acme")), ask(engine, job_of("why?", tenant="globex"))
    engine.step()
    assert engine.running == [first.row, other.row] and own.row in engine.waiting
    engine.run_until_idle()
    assert own.row.num_cached_tokens > 0 == other.row.num_cached_tokens


def test_choices_of_one_prompt_compute_it_once(make_engine: MakeEngine, alone: Alone) -> None:
    engine = make_engine({}, max_step_tokens=128)
    jobs = [job_of("what?", sampling=replace(SAMPLED, seed=seed)) for seed in range(6)]
    answers = run_together(engine, jobs)
    num_reused = len(PROMPT + "what?") // PAGE * PAGE
    assert [answer.row.num_cached_tokens for answer in answers] == [0] + [num_reused] * 5
    for job, answer in zip(jobs, answers, strict=True):
        assert_same(answer, alone(job, {}))
    assert_nothing_held(engine)


def test_a_conversation_computes_each_turn_once(make_engine: MakeEngine) -> None:
    """The answers are in the cache too, so a turn begins where the last one ended, but for the rest of a block."""
    engine, tokens = make_engine({}, max_model_len=400), list(b"hello")
    for _ in range(4):
        row = engine.prepare.of_tokens(greedy("", num_new=30), list(tokens), lambda event: None)
        num_known = len(tokens) - 5
        engine.submit(row)
        engine.run_until_idle()
        assert row.num_cached_tokens == max(num_known - 1, 0) // PAGE * PAGE
        tokens = [*row.tokens, *b"next?"]
    assert_nothing_held(engine)


def test_a_preempted_row_resumes_from_its_own_blocks(make_engine: MakeEngine, alone: Alone) -> None:
    engine = make_engine({}, kv_tokens=96, max_model_len=96)
    jobs = [replace(greedy("ab" * 12, request_id=i, num_new=40), tenant=f"t{i}") for i in range(2)]
    old, young = (ask(engine, job) for job in jobs)
    while not engine.counters.num_preemptions:
        engine.step()
    num_tokens = len(young.row.tokens)
    while young.row not in engine.running:
        engine.step()
    assert len(young.row.tokens) == num_tokens + 1 and engine.kv_cache.num_reused(young.row.kv_row) > 0
    engine.run_until_idle()
    for job, answer in zip(jobs, (old, young), strict=True):
        assert_same(answer, alone(job, {}))
        assert answer.row.num_cached_tokens == 0, "the client's prompt was not in the cache"
    assert_nothing_held(engine)


def test_a_row_whose_logits_are_not_finite_leaves_no_blocks(make_engine: MakeEngine, shapes: Shapes) -> None:
    hostile = random_adapter(shapes, 1, rank=3)
    broken = AdapterWeights(
        "0" * 64, {name: replace(module, scaling=float("nan")) for name, module in hostile.modules.items()}
    )
    engine = make_engine({broken.weights_digest: broken})
    before = engine.kv_cache.num_cached_tokens
    [answer] = run_together(engine, [job_of("x", only(broken))])
    assert answer.error is not None
    assert engine.kv_cache.num_cached_tokens == before
    assert_nothing_held(engine)


def test_a_grammar_that_fails_takes_no_blocks_from_others(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    run_together(engine, [job_of("what?")])
    grammar = SamplingParams(max_tokens=16, temperature=0, grammar=Grammar("regex", "[a-h]{9}"))
    failing = ask(engine, job_of("why?", sampling=grammar))
    engine.step()
    assert failing.row.grammar is not None
    failing.row.grammar.error = RuntimeError("too complex")
    engine.run_until_idle()
    assert isinstance(failing.error, GrammarFailed)
    [later] = run_together(engine, [job_of("where?")])
    assert later.row.num_cached_tokens >= len(PROMPT) // PAGE * PAGE
    assert_nothing_held(engine)


def test_a_row_that_needs_logits_of_its_prompt_computes_all_of_it(make_engine: MakeEngine) -> None:
    engine = make_engine({})
    run_together(engine, [job_of("x")])
    row = engine.prepare(job_of("x"), lambda event: None)
    row.skips_prefix_cache = True
    engine.submit(row)
    engine.step()
    assert (row.num_computed, row.num_cached_tokens) == (64, 0)
    engine.run_until_idle()
    assert_nothing_held(engine)


def test_a_conversation_in_window_layers_keeps_little_more_than_its_windows(make_engine: MakeEngine) -> None:
    """Gemma-3: the layers with a window plan a part of the memory, and every row still ends."""
    engine = make_engine({}, max_model_len=400, max_step_tokens=32)
    kv = engine.memory.kv
    assert kv.window_layers == {0, 2} and kv.num_window_tokens == 2 * 8 * 3 * PAGE + 32 < kv.num_tokens / 3
    assert engine.memory.kv_bytes == engine.kv_cache.num_bytes < kv.num_tokens * 3 * kv.layer_token_bytes * 0.55
    assert "2 of 3 layers keep a window of 12, which saves" in str(engine.memory)
    jobs = [greedy("abcdefgh" * 20 + str(i), request_id=i, num_new=40) for i in range(12)]
    answers = run_together(engine, jobs)
    for answer in answers[::5]:
        [lone] = run_together(make_engine({}, max_model_len=400, prefix_cache=False), [jobs[answers.index(answer)]])
        assert_same(answer, lone)
    assert_nothing_held(engine)


def test_joins_leave_no_page_and_no_key_behind(make_engine: MakeEngine, shapes: Shapes, scale: Scale) -> None:
    """Requests with shared prefixes of several plans and tenants in a cache that is always too small."""
    num_joins = scale.pick("joins", small=120, full=10_000)
    pool = [random_adapter(shapes, seed, rank=3) for seed in (1, 2)]
    plans = [BASE_PLAN, only(pool[0]), only(pool[1]), plan_of("fusion", (pool[0], 0.5), (pool[1], 0.5))]
    engine = make_engine(by_digest(*pool), kv_tokens=400)
    for start in range(0, num_joins, 12):
        for i in range(start, start + 12):
            text = PROMPT[: 20 + 29 * i % 60] + "ab" * (i % 7)
            ask(engine, replace(greedy(text, plans[i // 24 % 4], i, 1 + i % 10), tenant=f"t{i // 48 % 3}"))
        if start % 36 == 0:
            engine.step()
            engine.cancel(engine.running[0])
        engine.run_until_idle()
        assert engine.kv_cache.num_free_tokens == 400
    assert engine.counters.num_cached_tokens > 0 and engine.counters.num_evicted_blocks > 0
    assert_nothing_held(engine)
