from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from deployments.api.completions import ChatCompletionRequest
from deployments.auth.authenticator import Limiter
from deployments.errors import ModelNotFound, RequestInvalid
from deployments.ingress import follow_replicas
from gpu_worker.errors import PromptTooLong, SamplingInvalid
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from tests.deployments.adapter_records import BASE, POOL
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.fake_worker import DELTAS, NOTHING_CACHED, FakeWorker

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
SAMPLING = {"max_tokens": 9, "temperature": 0.25, "top_k": 4, "seed": 11, "stop": ["a"]}
DEATH = ActorDiedError()


async def generate(request: Any, **options: Any) -> tuple[dict[str, Any], Served]:
    served = serve_plainly(**options)
    return await served.ingress.generate(request), served


async def stream(request: Any, **options: Any) -> list[dict[str, Any]]:
    return [chunk async for chunk in serve_plainly(**options).ingress.stream(request)]


async def test_an_answer_is_the_workers_joined_text() -> None:
    answer, _ = await generate(CHAT)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello"}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8} | NOTHING_CACHED
    assert answer["model"] == "auto"
    assert [adapter["name"] for adapter in answer["lora"]["adapters"]] == ["poet", "coder"]
    assert "candidates" not in answer["lora"]


async def test_the_job_carries_prompt_plan_sampling_and_template() -> None:
    answer, served = await generate(CHAT | SAMPLING | {"model": "coder"})
    job = served.job
    assert job.prompt == (Message("user", "Hi"),)
    assert [row.ref for row in job.plan.adapters] == [POOL[1].ref]
    unset = frozenset({"top_p", "min_p", "repetition_penalty", "max_repeats"})
    assert job.sampling == SamplingParams(max_tokens=9, temperature=0.25, top_k=4, seed=11, stop=("a",), unset=unset)
    assert job.template == "chat"  # the template that its adapter names
    assert answer["id"] == f"chatcmpl-{job.request_id}"
    assert answer["model"] == "coder"
    assert [(await generate(CHAT, template=own))[1].job.template for own in ("auto", "alpaca")] == ["auto", "alpaca"]


async def test_limits_of_keys_follow_the_replicas_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error leaves the last number in force, and so does a status without this deployment."""
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="app", deployment="Ingress"))

    def states(**numbers: int) -> ServeStatus:
        ingress = DeploymentStatusOverview("HEALTHY", "UNSPECIFIED", numbers, "")  # type: ignore[arg-type]
        return ServeStatus(
            applications={"app": ApplicationStatusOverview("RUNNING", "", 0.0, {"Ingress": ingress})}  # type: ignore[arg-type]
        )

    read = [
        states(RUNNING=2, STARTING=18),
        ConnectionError("the controller is away"),
        ServeStatus(),
        states(RUNNING=1, UPDATING=1, RECOVERING=1, STOPPING=1),
        states(STARTING=1),
    ]
    numbers: list[int] = []

    class Divided(Limiter):
        def divide_by(self, num_replicas: int) -> None:
            numbers.append(num_replicas)

    def status() -> ServeStatus:
        match read.pop(0):
            case ServeStatus() as found:
                return found
            case error:
                raise error

    async def sleep(seconds: float) -> None:
        if not read:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await follow_replicas(Divided(1), status, sleep)
    assert numbers == [2, 3, 1]


async def test_user_config_changes_the_defaults_of_requests_while_the_server_runs() -> None:
    served = serve_plainly()
    for user_config, k, strategy, abstain in (
        ({"retrieval": {"k": 1, "strategy": "selection", "abstain": "strict"}}, 1, "selection", "strict"),
        ({}, 3, "mixture", "balanced"),
    ):
        served.ingress.reconfigure(user_config)
        await served.ingress.generate(CHAT)
        [request] = served.retriever.called("route")[-1][0]
        assert (request.top_k, request.strategy, request.abstain) == (k, strategy, abstain)
        stats = (await served.ingress.services.stats.read("local"))["defaults"]
        assert (stats["k"], stats["strategy"]) == (k, strategy)


async def test_user_config_changes_what_requests_leave_unset_for_sampling() -> None:
    served = serve_plainly(sampling_defaults={"top_k": 5})
    asked = CHAT | {"top_p": 0.5}
    for user_config, expected in (({"sampling_defaults": {"temperature": 0, "top_p": 0.9}}, 0), ({}, None)):
        served.ingress.reconfigure(user_config)
        await served.ingress.generate(asked)
        sampling = served.worker.called("stream")[-1][0].sampling
        assert sampling.top_p == 0.5
        assert ("temperature" in sampling.unset) == (expected is None) and "top_k" in sampling.unset
        assert expected is None or sampling.temperature == expected
        # The worker applies those of args, which change nothing that is set by then.
        assert sampling.with_defaults({"temperature": 0.7, "top_k": 5}).temperature == (0.7 if expected is None else 0)
        async with http_of(served) as client:
            card = (await client.get(f"/v1/models/{BASE}")).json()
        assert card["sampling_defaults"] == {"top_k": 5, **user_config.get("sampling_defaults", {})}
    with pytest.raises(ValueError, match="less than or equal to 2"):
        served.ingress.reconfigure({"sampling_defaults": {"temperature": 3}})


@pytest.mark.parametrize(
    ("user_config", "problem"),
    [
        ({"retrieval": {"encoder": "x"}}, "retrieval.encoder cannot change while the server runs; set it in args"),
        ({"base_model": "x"}, "base_model cannot change while"),
        ({"retrieval": {"k": 0}}, "greater than or equal to 1"),
    ],
)
async def test_user_config_with_anything_else_is_refused(user_config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        serve_plainly().ingress.reconfigure(user_config)


async def test_a_handle_caller_may_send_the_model_or_a_mapping() -> None:
    by_model, _ = await generate(ChatCompletionRequest.model_validate(CHAT))
    by_mapping, _ = await generate(CHAT)
    changing = {"id": None, "created": None}
    assert by_model | changing == by_mapping | changing
    with pytest.raises(RequestInvalid, match=r"lora\.kk"):
        await generate(CHAT | {"lora": {"kk": 1}})


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize("request_", [None, [1], "Hi", 5, {1: 2}, {}])
async def test_a_request_of_a_handle_that_is_no_object_is_refused(call: Callable[..., Any], request_: object) -> None:
    with pytest.raises(RequestInvalid, match=r"object with named fields|prompt: is missing"):
        await call(request_)


@pytest.mark.parametrize("caller", ["acme", None])
async def test_a_handle_names_its_tenant_by_a_caller(caller: Any) -> None:
    ingress = serve_plainly().ingress
    with pytest.raises(RequestInvalid, match=r"caller: must be .*\.Caller, got") as caught:
        await ingress.generate(CHAT, caller)
    assert caught.value.param == "caller"
    with pytest.raises(RequestInvalid, match="caller: must be"):
        await anext(ingress.stream(CHAT, caller))


async def test_a_stream_starts_with_the_plan_and_ends_with_the_reason() -> None:
    opening, *chunks = await stream(CHAT | {"lora": {"explain": True}})
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [candidate["name"] for candidate in opening["lora"]["candidates"]] == ["poet", "coder"]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert len({chunk["id"] for chunk in (opening, *chunks)}) == 1
    assert not any("lora" in chunk or "usage" in chunk for chunk in chunks)
    assert len(await stream(CHAT, worker=FakeWorker([Delta("Hi", 5, 1, "length")]))) == 2


@pytest.mark.parametrize("call", [generate, stream])
async def test_an_error_before_the_first_token_is_raised(call: Callable[..., Any]) -> None:
    with pytest.raises(PromptTooLong, match="long"):
        await call(CHAT, worker=FakeWorker([PromptTooLong("too long")]))
    with pytest.raises(ModelNotFound):
        await call(CHAT | {"model": "nobody"})
    with pytest.raises(SamplingInvalid):
        await call(CHAT | {"max_tokens": 1, "min_tokens": 2})


class Dying(FakeWorker):
    """Answers with `attempts` in turn, to any caller."""

    def __init__(self, *attempts: Sequence[Delta | Exception]) -> None:
        super().__init__()
        self._attempts = list(attempts)

    async def stream(self, job: Any) -> AsyncIterator[Delta]:
        self.events = self._attempts.pop(0)
        async for delta in super().stream(job):
            yield delta


def jobs_of(served: Served) -> list[Job]:
    """Return the jobs sent to the Worker, without their remaining times."""
    return [replace(job, time_left_s=None) for (job,) in served.worker.called("stream")]


async def test_only_the_answer_that_lost_its_worker_starts_again() -> None:
    answer, served = await generate(CHAT | {"n": 2}, worker=Dying(DELTAS, (DELTAS[0], DEATH), DELTAS))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello", "Hello"]
    first, second, again = jobs_of(served)
    assert first != second == again


class Endless(FakeWorker):
    """Yields one word, then waits forever."""

    waits: asyncio.Event

    async def stream(self, job: Any) -> AsyncIterator[Delta]:
        yield DELTAS[0]
        self.waits.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_a_client_that_leaves_during_generation_cancels_the_job(method: str) -> None:
    worker = Endless()
    worker.waits = asyncio.Event()
    served = serve_plainly(worker=worker)

    async def consume() -> None:
        if method == "generate":
            await served.ingress.generate(CHAT)
        else:
            async for _ in served.ingress.stream(CHAT):
                pass

    client = asyncio.create_task(consume())
    await worker.waits.wait()
    client.cancel()
    await asyncio.wait([client])
    assert served.worker.responses[0].num_cancels == 1
