from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from deployments.calls.worker_client import serve_worker
from deployments.publishing.evaluation import AnswerScorer
from gpu_worker.errors import AdapterLoadFailed
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta, Job
from lora_store import Sample
from retriever_svc import Region
from tests.deployments.adapter_records import POOL
from tests.deployments.app_fakes import Served, config_of
from tests.deployments.asking import ask
from tests.deployments.fake_publishing import workers_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import FakeWorker
from tests.fakes import FakeHandle

POET, CODER = POOL
CHATTING = config_of(template="chat").served_models
EXAMPLES = tuple(Sample(f"prompt {number}", "Yes.") for number in range(8))


class Poet(FakeWorker):
    """Answers as the poet's adapter should, and wrongly by any other."""

    async def stream(self, job: Job):  # type: ignore[no-untyped-def]
        [row] = job.plan.adapters
        yield None
        yield Delta(" yes" if row.ref == POET.ref else "no", 3, 1)
        yield Delta("", 3, 1, "stop")


class Broken(FakeWorker):
    async def stream(self, job: Job):  # type: ignore[no-untyped-def]
        raise AdapterLoadFailed("its file is damaged")
        yield


def scores(worker: FakeWorker, adapter=POET) -> list[float]:  # type: ignore[no-untyped-def]
    async def run() -> list[float]:
        client = serve_worker(FakeHandle(worker))
        return list(await AnswerScorer(workers_of(client), CHATTING).scores(adapter, EXAMPLES))

    return asyncio.run(run())


def test_an_answer_equal_but_for_case_space_and_full_stop_scores_one() -> None:
    assert scores(Poet()) == [1.0] * 8
    assert scores(Poet(), CODER) == [0.0] * 8


def test_an_adapter_that_cannot_be_loaded_scores_nothing() -> None:
    assert scores(Broken()) == [0.0] * 8


def test_jobs_are_greedy_short_and_take_turns_with_tenants() -> None:
    handle = FakeHandle(Poet())

    async def run() -> None:
        client = serve_worker(handle)
        await AnswerScorer(workers_of(client), CHATTING).scores(POET, EXAMPLES)

    asyncio.run(run())
    jobs = [job for (job,) in handle.called("stream")]
    assert len({job.request_id for job in jobs}) == 8
    assert {(job.sampling.temperature, job.sampling.max_tokens, job.tenant, job.template) for job in jobs} == {
        (0, 6, "evaluate:", "chat")
    }


def test_an_adapter_is_measured_as_its_contract_asks_it() -> None:
    handle = FakeHandle(Poet())
    contract = '{"instruction":"Is it so? {input}","stop":["END"],"sampling":{"temperature":1.5,"max_tokens":90}}'

    async def run() -> None:
        client = serve_worker(handle)
        scorer = AnswerScorer(workers_of(client), CHATTING)
        await scorer.scores(replace(POET, contract=contract), EXAMPLES[:1])

    asyncio.run(run())
    [(job,)] = handle.called("stream")
    assert job.prompt == (Message("user", "Is it so? prompt 0"),)
    assert (job.sampling.stop, job.sampling.temperature, job.sampling.max_tokens) == (("END",), 0, 6)


@pytest.mark.parametrize("rival_is_judged", [True, False])
def test_an_evaluation_stores_its_rankings_and_waits_until_they_are_served(rival_is_judged: bool) -> None:
    judged = frozenset({POET.ref, CODER.ref} if rival_is_judged else {POET.ref})
    region = Region(POET, (POET, CODER), EXAMPLES, judged)

    async def run(client, served: Served) -> None:  # type: ignore[no-untyped-def]
        response = await client.post("/v1/pool/evaluate", json={})
        *progress, last = map(json.loads, response.text.splitlines())
        assert progress == [{"done": 0, "total": 1}, {"done": 1, "total": 1}]
        rows = last["result"]["rankings"][0]["adapters"]
        expected = [("poet", 1.0, False)] + [("coder", 0.0, True)] * rival_is_judged
        assert [(row["name"], row["score"], row["is_beaten"]) for row in rows] == expected
        [(tenant, rankings, *_)] = served.store.called("rank")
        assert (tenant, [ranking.anchor for ranking in rankings]) == ("local", [POET.ref])
        calls = sorted(served.store.calls + served.retriever.calls, key=lambda call: call.number)
        assert [call.name for call in calls] == ["ping", "regions", "rank", "catch_up"]

    ask(run, worker=Poet(), retriever=FakeRetriever(to_evaluate=[region]))
