"""A full queue: a single tenant may use all of it; several tenants have equal shares."""

from __future__ import annotations

from collections import Counter

import pytest

from gpu_worker.errors import EngineFull
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.native.loop import Engine
from tests.gpu_worker.engine_driver import Answer, MakeEngine, ask, assert_nothing_held

PLACES = 12


def job_of(tenant: str, number: int) -> Job:
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    return Job(f"{tenant}-{number}", "short", sampling=sampling, tenant=tenant)


def fill(engine: Engine, tenant: str, count: int) -> list[Answer]:
    """Submit until `count` requests are accepted; the queue must accept them all."""
    return [ask(engine, job_of(tenant, number)) for number in range(count)]


def waiting_by_tenant(engine: Engine) -> Counter[str]:
    return Counter(row.tenant for row in engine.waiting)


def test_one_tenant_alone_may_use_the_whole_queue_and_is_refused_beyond_it(make_engine: MakeEngine) -> None:
    engine = make_engine({}, max_waiting=PLACES)
    answers = fill(engine, "a", PLACES)
    with pytest.raises(EngineFull, match=r"queue is full \(12 requests\)"):
        ask(engine, job_of("a", 99))
    engine.run_until_idle()
    assert all(answer.is_finished for answer in answers)


@pytest.mark.parametrize("others", [["b"], ["b", "c"]], ids=str)
def test_later_tenants_get_their_share_of_a_full_queue(others: list[str], make_engine: MakeEngine) -> None:
    engine = make_engine({}, max_waiting=PLACES)
    flood = fill(engine, "a", PLACES)
    share = PLACES // (len(others) + 1)
    late = [answer for tenant in others for answer in fill(engine, tenant, share)]
    assert waiting_by_tenant(engine) == {tenant: share for tenant in ("a", *others)}
    for tenant in ("a", *others):
        with pytest.raises(EngineFull):
            ask(engine, job_of(tenant, 99))
    refused = [answer for answer in flood if answer.events]
    assert refused == flood[share:], "the newest ones gave their places"
    assert all(isinstance(answer.error, EngineFull) and len(answer.events) == 1 for answer in refused)
    engine.run_until_idle()
    assert all(answer.is_finished for answer in (*flood[:share], *late))
    assert_nothing_held(engine)


def test_an_unused_share_is_free_for_the_others(make_engine: MakeEngine) -> None:
    engine = make_engine({}, max_waiting=PLACES, max_batch_size=1)
    fill(engine, "a", PLACES)
    [only] = fill(engine, "b", 1)
    engine.cancel(only.row)
    fill(engine, "a", 1)
    assert waiting_by_tenant(engine) == {"a": PLACES}
