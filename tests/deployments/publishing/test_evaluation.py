from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from deployments.calls.worker_client import serve_worker
from deployments.publishing.evaluation import AnswerScorer
from gpu_worker.errors import AdapterLoadFailed, AdapterLost, EngineStopped
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta, FinishReason, Job
from lora_store import AdapterRecord, Sample
from retriever_svc import Region
from tests.deployments.adapter_records import POOL
from tests.deployments.app_fakes import config_of
from tests.deployments.asking import asked
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
        raise AdapterLost("its file is damaged")
        yield


class Ended(FakeWorker):
    """Fails at the first prompt, and never answers the others."""

    async def stream(self, job: Job):  # type: ignore[no-untyped-def]
        if job.request_id == "evaluate-0":
            raise self.failure
        await asyncio.Event().wait()
        yield


def scored(
    worker: FakeWorker, adapter: AdapterRecord = POET, examples: tuple[Sample, ...] = EXAMPLES
) -> tuple[list[float], list[Job]]:
    """Return the scores of the examples, and the jobs that the worker got."""
    handle = FakeHandle(worker)

    async def run() -> list[float]:
        return list(await AnswerScorer(workers_of(serve_worker(handle)), CHATTING).scores(adapter, examples))

    return asyncio.run(run()), [job for (job,) in handle.called("stream")]


def test_an_answer_equal_but_for_case_space_and_full_stop_scores_one() -> None:
    found, jobs = scored(Poet())
    assert found == [1.0] * 8
    assert scored(Poet(), CODER)[0] == scored(Broken())[0] == [0.0] * 8, "nor one that is lost"
    assert len({job.request_id for job in jobs}) == 8
    asked = {(job.sampling.temperature, job.sampling.max_tokens, job.tenant, job.template) for job in jobs}
    assert asked == {(0, 6, "evaluate:", "chat")}, "greedy, short, and in turn with tenants"


LONG = "select name from people " * 9


@pytest.mark.parametrize(
    ("output", "max_tokens", "answer", "finish_reason", "score"),
    [
        ("सकारात्मक", 29, "सकारात्मक", "stop", 1.0),  # 27 bytes, each of which may be a token
        (LONG, 64, " SELECT name FROM peo", "length", 1.0),
        (LONG, 64, "select names", "length", 0.0),
        ("सकारात्मक " * 9, 64, "सकारात्म\ufffd", "length", 1.0),
        ("सकारात्मक " * 9, 64, "\ufffd", "length", 0.0),
        (LONG, 64, "select name", "stop", 0.0),
        (LONG, 64, "", "length", 0.0),
    ],
)
def test_a_right_answer_has_room_and_a_long_output_counts_as_far_as_it_was_generated(
    output: str, max_tokens: int, answer: str, finish_reason: FinishReason, score: float
) -> None:
    worker = FakeWorker((Delta(answer, 3, 9, finish_reason),))
    found, [job] = scored(worker, examples=(Sample("prompt", output),))
    assert (found, job.sampling.max_tokens) == ([score], max_tokens)


@pytest.mark.parametrize("error", [EngineStopped("stopped"), AdapterLoadFailed("the store cannot be reached")])
async def test_a_failed_example_ends_the_rows_of_the_others(error: Exception) -> None:
    handle = FakeHandle(Ended(failure=error))
    with pytest.raises(type(error)):
        await AnswerScorer(workers_of(serve_worker(handle)), CHATTING).scores(POET, EXAMPLES)
    streams = [response for response in handle.responses if hasattr(response.answer, "__aiter__")]
    assert len(streams) >= 4 and all(stream.num_cancels for stream in streams)


def test_an_adapter_is_measured_as_its_contract_asks_it() -> None:
    contract = '{"instruction":"Is it so? {input}","stop":["END"],"sampling":{"temperature":1.5,"max_tokens":90}}'
    _, [job, *_] = scored(Poet(), replace(POET, contract=contract))
    assert job.prompt == (Message("user", "Is it so? prompt 0"),)
    assert (job.sampling.stop, job.sampling.temperature, job.sampling.max_tokens) == (("END",), 0, 6)


@pytest.mark.parametrize("rival_is_judged", [True, False])
async def test_an_evaluation_stores_its_rankings_and_waits_until_they_are_served(rival_is_judged: bool) -> None:
    judged = frozenset({POET.ref, CODER.ref} if rival_is_judged else {POET.ref})
    region = Region(POET, (POET, CODER), EXAMPLES, judged)
    async with asked(worker=Poet(), retriever=FakeRetriever(to_evaluate=[region])) as (client, served):
        response = await client.post("/v1/pool/evaluate", json={})
        *progress, last = map(json.loads, response.text.splitlines())
        assert progress == [{"done": 0, "total": 1}, {"done": 1, "total": 1}]
        rows = last["result"]["rankings"][0]["adapters"]
        expected = [("poet", 1.0, False)] + [("coder", 0.0, True)] * rival_is_judged
        assert [(row["name"], row["score"], row["is_beaten"]) for row in rows] == expected
        [(tenant, rankings, *_)] = served.store.called("rank")
        assert (tenant, [ranking.anchor for ranking in rankings]) == ("local", [POET.ref])
        calls = sorted(served.store.calls + served.retriever.calls, key=lambda call: call.number)
        assert [call.name for call in calls if call.name != "expire"] == ["ping", "regions", "rank", "catch_up"]
