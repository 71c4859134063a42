"""Adapters are loaded, shared and forgotten while jobs run, and nothing leaks."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace

import pytest

from gpu_worker.errors import AdapterLoadFailed, AdapterUnfit, LogitsNotFinite, PlanTooLarge
from gpu_worker.front.request.request import Completion, SamplingParams
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Strategy
from tests.gpu_worker.conformance.driver import HostedEngine, MakeAdapter, assert_same, job, tokens_of
from tests.tiny import plan_of

NUM_FITTING = 4  # adapters of rank 4 in a bank of 16 rows
COMPOSED = ("mixture", "fusion")  # an engine may hold a fusion as one adapter
LONG = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)


def test_the_first_and_the_last_place_of_a_full_bank_leave_other_rows_unchanged(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    [base] = hosted.answers(job("a base row"))
    pool = [adapter(seed) for seed in range(NUM_FITTING)]
    jobs = [job("a base row"), *[job("a row with an adapter", plan_of("selection", (one, 1.0))) for one in pool]]
    together = hosted.answers(*jobs)
    assert hosted.status().occupied_rows == hosted.config.bank_rank_rows, "every place is taken"
    assert_same(together[:1], [base], tolerance)
    alone = [answer for one in jobs[1:] for answer in hosted.answers(one)]
    assert_same(together[1:], alone, tolerance)
    assert len({tuple(tokens_of(answer)) for answer in together}) == len(jobs)


def test_more_plans_and_more_adapters_than_places_all_are_answered(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    pool = [adapter(seed) for seed in range(3 * NUM_FITTING)]
    plans = [
        plan_of("mixture", (pool[number % 12], 0.5), (pool[(number * 5 + 1) % 12], 0.1 + number / 40))
        for number in range(24)
    ]
    plans = [plan for plan in plans if len({adapter.weights_digest for adapter in plan.adapters}) == 2]
    jobs = [job("many plans", plan) for plan in (*plans, BASE_PLAN)]
    together = hosted.answers(*jobs)
    assert len(jobs) > 2 * hosted.config.max_batch_size
    assert_same(together, [answer for one in jobs for answer in hosted.answers(one)], tolerance)


def test_more_fusions_than_places_all_are_answered(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    pool = [adapter(seed) for seed in range(2 * NUM_FITTING)]
    plans = [
        plan_of(
            "fusion", (pool[number % 8], 0.8), (pool[(number + 1) % 8], 0.1 * number), (pool[(number + 4) % 8], 0.3)
        )
        for number in range(1, 10)
    ]
    jobs = [
        job("many fusions", plan) for plan in (*plans, BASE_PLAN, plan_of("mixture", (pool[0], 0.5), (pool[1], 0.5)))
    ]
    together = hosted.answers(*jobs)
    assert_same(together, [answer for one in jobs for answer in hosted.answers(one)], tolerance)
    assert len({tuple(tokens_of(answer)) for answer in together}) > len(jobs) / 2


def test_a_place_that_held_another_adapter_has_nothing_of_it(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    """Free places hold NaN. A later adapter of fewer modules and lower rank must not read what is left there."""
    small = adapter(1, rank=2, modules=lambda name: "down_proj" in name)
    asked = job("after others", plan_of("mixture", (small, 1.0)))
    [first] = hosted.answers(asked)
    for seed in range(2, 2 + 3 * NUM_FITTING):
        hosted.answers(job("another", plan_of("selection", (adapter(seed, size=0.3), 1.0))))
    for _ in range(3):
        assert hosted.run(hosted.engine.forget([small.weights_digest]))
        assert_same(hosted.answers(asked), [first], tolerance)


@pytest.mark.parametrize("strategy", COMPOSED)
def test_forgotten_weights_are_gone_and_fetched_again(
    strategy: Strategy, hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    one, other = adapter(1), adapter(2)
    asked = job("forget", plan_of(strategy, (one, 0.5), (other, 0.5)))
    first = hosted.answers(asked)
    digests = {one.weights_digest, other.weights_digest}
    assert hosted.status().resident == digests
    assert hosted.run(hosted.engine.expected()) == digests
    assert hosted.run(hosted.engine.forget([one.weights_digest]))
    assert one.weights_digest not in hosted.status().resident
    assert_same(hosted.answers(asked), first, tolerance)
    assert sorted(hosted.fetched) == sorted([*digests, one.weights_digest])
    assert hosted.run(hosted.engine.forget(digests))
    status = hosted.status()
    assert (status.resident, status.occupied_rows, status.host_cache_bytes) == (frozenset(), 0, 0)


@pytest.mark.parametrize("strategy", COMPOSED)
def test_a_withdrawal_under_way_waits_for_the_jobs_that_use_the_adapter(
    strategy: Strategy, hosted: HostedEngine, adapter: MakeAdapter
) -> None:
    weights, other = adapter(1), adapter(2)
    asked = job("keep", plan_of(strategy, (weights, 0.7), (other, 0.6)), LONG)
    [whole] = hosted.answers(asked)

    async def withdraw() -> tuple[bool, str, frozenset[str]]:
        parts = []
        is_gone = True
        async for delta in hosted.engine.stream(asked):
            if delta is not None:
                if not parts:
                    is_gone = await hosted.engine.forget([weights.weights_digest])
                parts.append(delta.text)
        while (await hosted.engine.status()).num_forgetting:
            await asyncio.sleep(0.01)
        return is_gone, "".join(parts), (await hosted.engine.status()).resident

    is_gone, text, resident = hosted.run(withdraw())
    assert (is_gone, text, weights.weights_digest in resident) == (False, whole.text, False)


@pytest.mark.parametrize("strategy", COMPOSED)
def test_an_update_while_jobs_run_changes_only_the_jobs_that_name_the_new_version(
    strategy: Strategy, hosted: HostedEngine, adapter: MakeAdapter
) -> None:
    old, new, other = adapter(1), adapter(2), adapter(3)
    old_job = job("version", plan_of(strategy, (old, 0.7), (other, 0.6)), LONG)
    new_job = job("version", plan_of(strategy, (new, 0.7), (other, 0.6)), LONG)
    [of_old], [of_new] = hosted.answers(old_job), hosted.answers(new_job)
    assert of_old.text != of_new.text
    assert hosted.run(hosted.engine.forget([old.weights_digest, new.weights_digest]))

    async def update() -> list[Completion | Exception]:
        running = asyncio.create_task(hosted.engine.generate([old_job] * 3))
        while not (await hosted.engine.status()).num_running:
            assert not running.done(), "it ended before the update"
            await asyncio.sleep(0)
        late = await hosted.engine.generate([new_job] * 3)
        return [*await running, *late]

    texts = [answer.text for answer in hosted.run(update()) if isinstance(answer, Completion)]
    assert texts == [of_old.text] * 3 + [of_new.text] * 3


def test_a_failed_load_fails_only_the_jobs_that_need_it(hosted: HostedEngine, adapter: MakeAdapter) -> None:
    good = adapter(1)
    missing = adapter(2)
    del hosted.pool[missing.weights_digest]
    asked = [
        job("good", plan_of("selection", (good, 1.0))),
        job("bad", plan_of("mixture", (good, 0.5), (missing, 0.5))),
        job("base"),
    ]
    first, failed, last = hosted.outcomes(*asked)
    assert isinstance(failed, AdapterLoadFailed)
    assert isinstance(first, Completion) and isinstance(last, Completion)


@pytest.mark.parametrize("flaw", ["unknown module", "other shape", "not finite"])
def test_an_adapter_that_does_not_fit_fails_only_its_own_job(
    flaw: str, hosted: HostedEngine, adapter: MakeAdapter
) -> None:
    weights = adapter(1)
    name = next(iter(weights.modules))
    module = weights.modules[name]
    flaws = {
        "unknown module": {"model.layers.9.mlp.up_proj": module},
        "other shape": {name: ModuleWeights(module.lora_a[:, :-1], module.lora_b, module.scaling)},
        "not finite": {name: ModuleWeights(module.lora_a * float("inf"), module.lora_b, module.scaling)},
    }
    bad = AdapterWeights("b" * 64, weights.modules | flaws[flaw])
    hosted.add(bad)
    outcomes = hosted.outcomes(job("base"), job("unfit", plan_of("selection", (bad, 1.0))))
    assert isinstance(outcomes[0], Completion)
    assert isinstance(outcomes[1], AdapterUnfit), outcomes[1]


def test_a_plan_larger_than_the_bank_is_refused_and_the_largest_that_fits_runs(
    hosted: HostedEngine, adapter: MakeAdapter
) -> None:
    pool = [adapter(seed) for seed in range(NUM_FITTING + 1)]
    large, fits = (job("large", plan_of("mixture", *[(one, 0.2) for one in some])) for some in (pool, pool[:-1]))
    refused, answer = hosted.outcomes(large, fits)
    assert isinstance(refused, PlanTooLarge) and "20" in str(refused) and "16" in str(refused)
    assert isinstance(answer, Completion)


def test_a_slow_load_delays_only_its_own_job(hosted: HostedEngine, adapter: MakeAdapter) -> None:
    slow, good = adapter(1), adapter(2)
    hosted.held[slow.weights_digest] = Future()

    async def both() -> tuple[Completion | Exception, Completion | Exception]:
        waiting = asyncio.create_task(hosted.engine.generate([job("slow", plan_of("selection", (slow, 1.0)))]))
        [quick] = await hosted.engine.generate([job("quick", plan_of("selection", (good, 1.0)))])
        assert (await hosted.engine.status()).num_waiting == 1
        hosted.held.pop(slow.weights_digest).set_result(slow)
        [late] = await waiting
        return quick, late

    assert all(isinstance(answer, Completion) for answer in hosted.run(both()))


def test_a_probe_gives_the_effect_of_each_adapter_or_its_error(hosted: HostedEngine, adapter: MakeAdapter) -> None:
    large, small = adapter(1, size=0.2), adapter(2, size=0.05)
    idle, lost = (
        AdapterWeights(letter * 64, {n: replace(m, lora_b=m.lora_b * share) for n, m in large.modules.items()})
        for letter, share in (("c", 0.0), ("d", 1e-6))
    )
    wide = adapter(3, rank=hosted.config.bank_rank_rows + 1)
    misfit = AdapterWeights("e" * 64, {"nowhere": next(iter(large.modules.values()))})
    hosted.add(idle, lost, misfit)
    digests = [weights.weights_digest for weights in (large, small, idle, lost, wide, misfit)]
    before = hosted.status().counters
    of_large, of_small, of_idle, of_lost, *errors = hosted.run(hosted.engine.probe([*digests, "0" * 64]))
    after = hosted.status().counters
    names = ("num_requests", "num_prompt_tokens", "num_new_tokens")
    assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names], "no traffic"
    assert [type(error) for error in errors] == [PlanTooLarge, AdapterUnfit, AdapterLoadFailed]
    assert isinstance(of_large, float) and isinstance(of_small, float)
    assert of_large > of_small > 0
    assert of_idle == of_lost == 0.0


def test_probes_change_no_log_probabilities_of_rows_beside_them(
    hosted: HostedEngine, adapter: MakeAdapter, tolerance: float
) -> None:
    asked, digest = job("beside", sampling=replace(LONG, logprobs=5)), adapter(1).weights_digest

    async def beside() -> Completion | Exception:
        running = asyncio.create_task(hosted.engine.generate([asked]))
        while not running.done():
            await hosted.engine.probe([digest])
        return (await running)[0]

    found, [alone] = hosted.run(beside()), hosted.answers(asked)
    assert isinstance(found, Completion)
    for entry, expected in zip(found.logprobs, alone.logprobs, strict=True):
        assert [value for _, value in entry.top] == pytest.approx([value for _, value in expected.top], abs=tolerance)


def test_a_probe_refuses_an_adapter_that_overflows(hosted: HostedEngine, adapter: MakeAdapter) -> None:
    good, other = adapter(1), adapter(2)
    huge = {name: replace(module, lora_a=module.lora_a * 1e38) for name, module in other.modules.items()}
    hosted.add(AdapterWeights("f" * 64, huge))
    shift, error = hosted.run(hosted.engine.probe([good.weights_digest, "f" * 64]))
    assert isinstance(shift, float) and shift > 0.0
    assert isinstance(error, LogitsNotFinite)


def test_only_the_same_tenant_finds_a_prompt_under_the_same_plan(hosted: HostedEngine, adapter: MakeAdapter) -> None:
    """The prompt fills a block of either engine: 16 tokens of the native one, 128 of vLLM."""
    one, other = adapter(7), adapter(8)
    plans = [BASE_PLAN, plan_of("mixture", (one, 0.5), (other, 0.5)), plan_of("fusion", (one, 0.5), (other, 0.5))]

    def found(tenant: str) -> list[int]:
        jobs = [job("a prompt of some length " * 6, plan, tenant=tenant) for plan in plans]
        return [answer.num_cached_tokens for each in jobs for answer in hosted.answers(each)]

    assert found("first") == found("second") == [0] * len(plans)
    cached = {"native": 144, "vllm": 128}[hosted.config.engine]
    assert found("first") == found("second") == [cached] * len(plans)
