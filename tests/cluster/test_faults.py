"""Requests of clients while replicas and nodes are killed. At full counts the numbers are stored."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import psutil
import pytest
from pyarrow import dataset
from ray import serve

from benchmarks.results_file import write_part
from deployments.calls.serve_calls import retry_on_replica_death
from deployments.errors import PoisonRequest
from deployments.scaling.residency import ResidencyReport
from deployments.worker import WorkerDeployment
from gpu_worker.front.request.request import Delta, Job, SamplingParams
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.engine import NativeEngine
from tests.cluster.load import CLIENTS, KEY, LETTERS, SAMPLING, Load, Outcome
from tests.cluster.machines import APP
from tests.cluster.running import TENANTS, TOPICS, Running, asks
from tests.deployments.key_files import bearer
from tests.e2e.live import eventually, eventually_equal, running_and_waiting, write_adapter
from tests.served_engine import ENGINE, needs_own_process
from tests.soak import Scale
from tests.tiny import linear_shapes, tiny_config

MAX_BATCH_SIZE = 16  # per worker: tests/cluster/serve.yaml
STREAMING = 3  # before a worker is killed
MOST_REQUESTS = 10_000  # more than are asked while the cluster changes
LEAST_ANSWERS = 20  # during each change
NUM_RESULTS = {"native": 5, "vllm": 7}  # of all tests of this file together


@dataclass
class Results:
    """The results of this file's tests, one row for each load."""

    values: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, outcomes: Sequence[Outcome], **values: float) -> None:
        self.values |= values
        ends = Counter(f"{'stream' if o.ask.is_streamed else 'whole'}: {o.end}" for o in outcomes)
        retried = sum(outcome.retries > 0 for outcome in outcomes)
        row = {"what": what, "requests": len(outcomes), "failed": len(failed(outcomes)), "asked_again": retried}
        self.rows.append(row | {"ends": dict(ends)})

    def table(self) -> str:
        columns = ("what", "requests", "failed", "asked_again")
        lines = [columns, *[[str(row[column]) for column in columns] for row in self.rows]]
        return "\n".join(f"{what:<52}" + "".join(f"{cell:>14}" for cell in cells) for what, *cells in lines)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    results = Results()
    yield results
    if request.config.getoption("--scale") == "full" and len(results.values) == NUM_RESULTS[ENGINE]:
        of_engine = "" if ENGINE == "native" else f"_{ENGINE}"
        values = {f"{name}{of_engine}": value for name, value in results.values.items()}
        write_part("cluster", f"kills{of_engine}", figures=values, table=results.table(), runs=results.rows)


def failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if not outcome.is_answer]


def test_defaults_of_requests_change_while_every_replica_runs_on(running: Running) -> None:
    machines = running.machines

    def defaults() -> set[int]:
        """Return the numbers of adapters that the Ingresses state. Either may answer a request."""
        answers = [httpx.get(f"{machines.url}/v1/stats", headers=bearer(KEY), timeout=60) for _ in range(20)]
        return {answer.json()["defaults"]["k"] for answer in answers}

    asyncio.run(machines.until_full())
    before = machines.all_replicas()
    for user_config, k in (({"retrieval": {"k": 1}}, 1), ({}, 3)):
        machines.deploy_with(user_config)
        eventually(lambda k=k: defaults() == {k}, within_s=120)
    eventually_equal(machines.all_replicas, before)  # Serve counts a replica as updating for a moment longer


@pytest.mark.parametrize("victim", ["worker", pytest.param("engine of a worker", marks=needs_own_process)])
def test_no_answer_is_lost_and_every_stream_ends_well_while_workers_are_killed(
    victim: str, running: Running, results: Results, scale: Scale
) -> None:
    num_kills = scale.pick("kills of a worker", small=1, full=8)
    num_whole = scale.pick("requests", small=30, full=500)
    num_streamed = scale.pick("streams", small=20, full=200)
    machines, part = running.machines, (num_whole + num_streamed) // (num_kills + 1)

    async def kill_workers(load: Load) -> None:
        for _ in range(num_kills):
            await machines.until_full("Worker")
            load.release(part)
            await load.until(lambda: load.num_streaming >= STREAMING)
            if victim == "worker":
                machines.kill("Worker")
            else:
                machines.kill_engine("Worker")
        await machines.until_full("Worker")

    outcomes = asyncio.run(running.load().run(asks(num_whole, num_streamed=num_streamed), kill_workers))
    streams = [outcome for outcome in outcomes if outcome.ask.is_streamed]
    wholes = [outcome for outcome in outcomes if not outcome.ask.is_streamed]
    what = f"{num_kills} kills of a {victim}"
    if victim == "worker":
        results.add(what, outcomes, worker_kills_lost=len(failed(wholes)), streams_malformed=len(failed(streams)))
    else:
        lost, malformed = len(failed(wholes)), len(failed(streams))
        results.add(what, outcomes, engine_kills_lost=lost, engine_kills_streams_malformed=malformed)
    assert (len(wholes), len(streams)) == (num_whole, num_streamed)
    assert failed(outcomes) == []
    ends = {outcome.end for outcome in streams}
    assert ends <= {"[DONE]", "replica_died"}
    assert num_kills == 1 or "replica_died" in ends  # a single kill may hit a worker without streams
    eventually_equal(lambda: running_and_waiting(APP), 0)
    for held in machines.on_all("Worker", "load"):
        assert (held.active_rows, held.free_kv_rows, held.num_forgetting) == (0, MAX_BATCH_SIZE, 0)


def test_the_openai_client_raises_the_error_that_ends_a_stream(running: Running) -> None:
    for _ in range(3):
        if (error := error_of_a_stream_cut_off(running)) is not None:
            break
    asyncio.run(running.machines.until_full("Worker"))
    assert error is not None, "every kill came after the stream's end"
    assert error.code == "replica_died"
    assert isinstance(error.body, dict) and error.body["type"] == "overloaded_error"
    assert "send the request again" in error.message


def error_of_a_stream_cut_off(running: Running) -> openai.APIError | None:
    """Return the client's error when all workers are killed during its stream; None if the stream ended before."""
    asyncio.run(running.machines.until_full("Worker"))
    workers = running.machines.replicas("Worker")
    with openai.OpenAI(base_url=f"{running.machines.url}/v1", api_key=KEY, max_retries=0) as client:
        asked = {"model": "tiny", "prompt": "The sea", "max_tokens": 400, "n": 16, **SAMPLING}
        stream = client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        while not any(choice.text for choice in next(stream).choices):
            pass
        for worker in workers:  # any of them may be answering
            worker.kill()
        try:
            rest = [choice for chunk in stream for choice in chunk.choices]
        except openai.APIError as exc:
            return exc
    assert {choice.index for choice in rest if choice.finish_reason == "length"} == set(range(16))
    return None


def test_no_request_fails_while_retrievers_and_all_stores_are_killed(
    running: Running, results: Results, scale: Scale
) -> None:
    num_kills = scale.pick("kills of a retriever and of the store", small=1, full=3)
    num_whole = scale.pick("requests", small=40, full=500)
    machines, part = running.machines, num_whole // (2 * num_kills + 1)

    async def kill_others(load: Load) -> None:
        for name, kill in [("Retriever", machines.kill), ("Store", machines.kill_all)] * num_kills:
            await machines.until_full(name)
            already = len(load.outcomes)
            load.release(part)
            await load.until(lambda already=already: len(load.outcomes) > already)
            kill(name)

    outcomes = asyncio.run(running.load().run(asks(num_whole), kill_others))
    what = f"{num_kills} kills of a retriever, {num_kills} of the store"
    results.add(what, outcomes, other_kills_failed=len(failed(outcomes)))
    assert len(outcomes) == num_whole
    assert failed(outcomes) == []


def test_a_client_that_retries_survives_the_death_of_an_ingress_and_a_node(
    running: Running, results: Results, scale: Scale
) -> None:
    num_whole = scale.pick("requests", small=40, full=500)
    num_alone = scale.pick("kills of an ingress before the node's", small=0, full=1)
    machines, left = running.machines, dict[str, int]()

    async def kill_ingress_and_node(load: Load) -> None:
        kills: list[Callable[[str], None]] = [*[machines.kill] * num_alone, machines.kill_node_of]
        for kill in kills:
            await machines.until_full()
            for name, replicas in machines.all_replicas().items():
                assert len({replica.node_id for replica in replicas}) == len(replicas) > 1, name
            already = len(load.outcomes)
            load.release(num_whole // len(kills))
            await load.until(lambda already=already: len(load.outcomes) > already)
            await asyncio.to_thread(kill, "Ingress")
        left.update({name: len(replicas) for name, replicas in machines.all_replicas().items()})

    outcomes = asyncio.run(running.load(max_retries=2).run(asks(num_whole), kill_ingress_and_node))
    what = "an ingress and a whole node, client's 2 retries"
    results.add(what, outcomes, node_kill_failed_with_retries=len(failed(outcomes)))
    assert len(outcomes) == num_whole
    assert failed(outcomes) == []
    assert all(number >= 1 for number in left.values()) and len(left) == 4, left
    machines.replace_dead_nodes()
    asyncio.run(machines.until_full())


def test_no_request_is_lost_while_adapters_nodes_code_and_settings_change(
    running: Running, results: Results, scale: Scale, tmp_path: Path
) -> None:
    if not scale.is_full:
        pytest.skip("two nodes die, and every replica is replaced twice: in make soak")
    num_running = scale.pick("requests at once", small=0, full=3)
    machines, new_names = running.machines, ("chess", "bridges")
    shapes = linear_shapes(load_base_model(tiny_config(running.model)))
    num_answered = list[int]()  # during each event

    def post(path: str, **sent: Any) -> httpx.Response:
        return httpx.post(f"{machines.url}/v1/{path}", headers=bearer(KEY), timeout=300, **sent)

    def publish_and_ask() -> None:
        for seed, name in enumerate(new_names, start=len(TOPICS)):
            folder = write_adapter(tmp_path / name, shapes, seed, name)
            files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
            published = post("loras", files=files, data={"name": name})
            assert published.status_code in (201, 202), published.text  # 202: one of the Retrievers is behind
            body = {"model": name, "prompt": "The sea", "max_tokens": 4}
            eventually_equal(lambda body=body: post("completions", json=body).status_code, 200)

    async def lose_a_node_of(deployment: str) -> None:
        await asyncio.to_thread(machines.kill_node_of, deployment)
        left = {name: len(replicas) for name, replicas in machines.all_replicas().items()}
        assert all(number >= 1 for number in left.values()), left
        machines.replace_dead_nodes()

    async def replace_every_replica(**changes: Any) -> None:
        before = machines.all_replicas()
        await asyncio.to_thread(machines.deploy_with, {}, **changes)
        await machines.until_replaced(before)

    async def deploy_the_next_version() -> None:
        await replace_every_replica(import_path="tests.cluster.next_version:build_app")
        assert all(await asyncio.to_thread(machines.on_all, "Worker", "is_of_the_next_version"))

    async def change_all(load: Load) -> None:
        events: tuple[Callable[[], Awaitable[None]], ...] = (
            lambda: asyncio.to_thread(publish_and_ask),
            lambda: lose_a_node_of("Worker"),
            lambda: lose_a_node_of("Ingress"),
            deploy_the_next_version,
            lambda: replace_every_replica(max_request_s=590),  # and back to this version
        )
        async with load.kept_running(num_running):
            for event in events:
                already = len(load.outcomes)
                await load.until(lambda already=already: len(load.outcomes) > already)
                await event()
                await machines.until_full()
                await load.until(lambda already=already: len(load.outcomes) >= already + LEAST_ANSWERS)
                num_answered.append(len(load.outcomes) - already)

    outcomes = asyncio.run(running.load(max_retries=2).run(asks(MOST_REQUESTS), change_all))
    for name in new_names:
        httpx.delete(f"{machines.url}/v1/loras/{name}", headers=bearer(KEY), timeout=300).raise_for_status()
    whats = ("2 adapters published", "a worker's node", "an ingress's node", "new code", "a setting")
    for event, number in zip(whats, num_answered, strict=True):
        scale.record(f"answers during {event}", number)
    what = "2 adapters, 2 whole nodes, code, a setting; 2 retries"
    results.add(what, outcomes, changes_failed_with_retries=len(failed(outcomes)))
    assert failed(outcomes) == []


def test_a_worker_whose_step_hangs_is_replaced_and_its_request_starts_again(
    running: Running, scale: Scale, tmp_path: Path
) -> None:
    num_hangs = scale.pick("hangs of one request", small=1, full=3)
    hangs = [tmp_path / str(number) for number in range(num_hangs)]

    class Hanging(WorkerDeployment):
        """Hangs in the next step, once per file."""

        async def stream(self, job: Job) -> AsyncGenerator[Delta | ResidencyReport]:
            for hang in hangs:
                with suppress(FileNotFoundError):
                    hang.unlink()
                    self._hang()
                    break
            async for delta in super().stream(job):
                yield delta

        def _hang(self) -> None:
            if isinstance(self._engine, NativeEngine):
                self._engine.loop.step = Event().wait
                return
            for child in psutil.Process().children(recursive=True):
                child.suspend()

    worker = serve.deployment(
        Hanging,
        name="Worker",
        max_ongoing_requests=64,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=600,
        ray_actor_options={"num_cpus": 0, "resources": {"accelerator": 1}},
    )
    step_timeout_s = 2.0 if ENGINE == "native" else 30.0
    config = tiny_config(running.model, num_threads=1, engine=ENGINE, step_timeout_s=step_timeout_s, niceness=0)
    handle = serve.run(worker.bind(config, None), name="hanging", route_prefix=None)
    letters = tuple((int(token), 100.0) for token in LETTERS)
    num_tokens = 80
    sampling = SamplingParams(max_tokens=num_tokens, seed=11, logit_bias=letters, ignore_eos=True)
    job = Job("hanging", "The sea", sampling=sampling)

    async def attempt() -> str:
        deltas = [delta async for delta in handle.options(stream=True).stream.remote(job)]
        return "".join(delta.text for delta in deltas if isinstance(delta, Delta))  # others are heartbeats

    async def text() -> str:
        return await retry_on_replica_death(attempt)

    try:
        expected = asyncio.run(text())
        assert len(expected) == num_tokens
        for hang in hangs:
            hang.touch()
        if num_hangs == 3:
            with pytest.raises(PoisonRequest):
                asyncio.run(text())
        assert asyncio.run(text()) == expected
        assert not any(hang.exists() for hang in hangs)
    finally:
        serve.delete("hanging", _blocking=False)


@dataclass
class Counted:
    """What clients of many tenants counted: (tenant, prompt tokens, new tokens) of complete answers, by request id."""

    complete: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    @property
    def num_ended(self) -> int:
        return len(self.complete) + len(self.broken)

    async def ask(self, http: httpx.AsyncClient, tenant: str, number: int) -> None:
        """Send one request, every second one as a stream. An answer is complete once its last byte has arrived."""
        id, usage = f"{tenant}-{number}", None
        body = {"model": "tiny", "prompt": "The sea " * (1 + number % 3), "max_tokens": 2 + number % 7, **SAMPLING}
        if is_streamed := number % 2 == 0:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        with suppress(httpx.HTTPError):
            response = await http.post("/v1/completions", json=body, headers=bearer(tenant) | {"x-request-id": id})
            if response.status_code == 200 and not is_streamed:
                usage = response.json()["usage"]
            elif response.status_code == 200 and response.text.endswith("data: [DONE]\n\n"):
                usage = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))["usage"]
        if usage is None:
            self.broken.add(id)
        else:
            self.complete[id] = tenant, usage["prompt_tokens"], usage["completion_tokens"]


def test_usage_equals_what_20_tenants_counted_while_every_kind_of_replica_dies(running: Running, scale: Scale) -> None:
    num_kills = scale.pick("kills of each kind of replica", small=1, full=3)
    num_requests = scale.pick("requests of 20 tenants", small=100, full=10_000)
    machines, counted = running.machines, Counted()
    victims = ["Ingress", "Worker", "Retriever", "Store"] * num_kills
    part = num_requests // len(victims)

    async def run() -> None:
        waiting, released = iter(range(num_requests)), asyncio.Semaphore(0)

        def release(count: int) -> None:
            for _ in range(count):
                released.release()

        async with httpx.AsyncClient(base_url=machines.url, timeout=300) as http, asyncio.TaskGroup() as tasks:

            async def client() -> None:
                for number in waiting:
                    await released.acquire()
                    await counted.ask(http, TENANTS[number % len(TENANTS)], number)

            for _ in range(CLIENTS):
                tasks.create_task(client())
            for place, victim in enumerate(victims, start=1):
                await machines.until_full(victim)  # with no request to spare: every kill is under load
                release(part)
                while counted.num_ended < place * part - part // 2:
                    await asyncio.sleep(0.01)
                machines.kill(victim)
            release(num_requests - len(victims) * part)

    asyncio.run(run())
    asyncio.run(machines.until_full())
    scale.record("answers that a kill broke", len(counted.broken))
    assert counted.num_ended == num_requests
    most = 2 * num_kills * CLIENTS
    assert len(counted.broken) <= most, "only what a killed Ingress or Worker was answering may break"

    def events() -> list[dict[str, Any]]:
        httpx.get(f"{machines.url}/v1/usage", headers=bearer(KEY), timeout=60).raise_for_status()
        stored = dataset.dataset(running.pool / "usage", partitioning="hive").to_table().to_pylist()
        found = {event["id"]: event for event in stored if event["tenant"] in TENANTS}
        return list(found.values())

    eventually(lambda: counted.complete.keys() <= {event["request_id"] for event in events()})
    found = events()
    by_request = Counter(event["request_id"] for event in found)
    assert set(by_request.values()) == {1}, "none twice"
    assert by_request.keys() - counted.complete.keys() <= counted.broken
    recorded = {
        event["request_id"]: (event["tenant"], event["prompt_tokens"], event["completion_tokens"])
        for event in found
        if event["request_id"] in counted.complete
    }
    assert recorded == counted.complete
    report = httpx.get(f"{machines.url}/v1/usage?by=tenant", headers=bearer(KEY), timeout=60).json()["data"]
    columns = ("prompt_tokens", "completion_tokens")
    totals = {(row["tenant"], name): row[name] for row in report if row["tenant"] in TENANTS for name in columns}
    sums = Counter[tuple[str, str]]()
    for event in found:
        sums.update({(event["tenant"], name): event[name] for name in columns})
    assert totals == sums
    requests = {row["tenant"]: row["requests"] for row in report if row["tenant"] in TENANTS}
    assert requests == Counter(event["tenant"] for event in found)


def test_the_pool_survives_the_death_of_all_nodes(running: Running, scale: Scale) -> None:
    if not scale.is_full:
        pytest.skip("everything starts again: in make soak")
    running.machines.stop()
    running.machines.start()
    eventually(
        lambda: {size.num_adapters for size in running.machines.on_all("Retriever", "load", "local")} == {len(TOPICS)}
    )
    cards = httpx.get(f"{running.machines.url}/v1/models", headers=bearer(KEY)).json()["data"]
    assert [card["id"] for card in cards] == ["auto", "tiny", *sorted(TOPICS)]
    outcomes = asyncio.run(running.load().run(asks(len(running.expected))))
    assert failed(outcomes) == []
