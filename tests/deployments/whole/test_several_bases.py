"""One application with two base models of different shapes. Store, catalogue, encoder, index and Ingress are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from ray.exceptions import RayActorError

from gpu_worker.config import PACKAGED_MODEL
from gpu_worker.front.request.request import Job
from tests.deployments.adapter_records import MODULE, write_random_folder
from tests.deployments.app_fakes import Served
from tests.deployments.asking import error_of
from tests.deployments.console_fakes import CountingWorker
from tests.deployments.observability.test_usage import events_in
from tests.deployments.real_app import real_app
from tests.fakes import FakeHandle

SHAPES = {"first": (8, 6), "second": (12, 10)}
ADAPTERS = {"poet": "first", "lyricist": "first", "coder": "second"}
PROMPTS = {
    "poet": ["Write a poem.", "Rhyme this line."],
    "lyricist": ["Write a song.", "Set this line to music."],
    "coder": ["Write a function.", "Fix this loop."],
}
MODELS = (
    {"base_model": "somewhere/first", "template": "alpaca", "worker": {"max_model_len": 64}},
    {"base_model": "somewhere/second", "template": "chat", "sampling_defaults": {"top_k": 7}},
)


@dataclass
class ShapedWorker(CountingWorker):
    """The worker of one base model, which may be away, or never start."""

    name: str = "first"
    is_away: bool = False
    is_asleep: bool = False

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        if self.is_asleep:
            await asyncio.Event().wait()
        if self.is_away:
            raise RayActorError
        return {MODULE: SHAPES[self.name]}

    async def forget(self, weights_digests: Collection[str]) -> bool:
        return True


@dataclass
class Case:
    """The application, and the handle of each base model's workers."""

    client: httpx.AsyncClient
    served: Served
    workers: dict[str, FakeHandle]

    async def chat(self, prompt: str, **fields: Any) -> httpx.Response:
        body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]} | fields
        return await self.client.post("/v1/chat/completions", json=body)

    def take_jobs(self) -> list[tuple[str, Job]]:
        """Return the jobs since the last call, with the base models whose workers got them."""
        jobs = [
            (name, *call.args)
            for name, handle in self.workers.items()
            for call in handle.calls
            if call.name == "stream"
        ]
        for handle in self.workers.values():
            handle.calls.clear()
        return jobs

    async def publish(self, folder: Path, name: str, base_model: str, **fields: Any) -> httpx.Response:
        path, seed = folder / base_model / name, len(folder.parts) * 100 + len(name)
        write_random_folder(path, seed, PROMPTS[name], base_model=base_model, shape=SHAPES[base_model])
        return await self.client.post("/v1/loras", json={"path": str(path), **fields})


@asynccontextmanager
async def serving(folder: Path, *, is_asleep: bool = False, **settings: Any) -> AsyncIterator[Case]:
    replicas = [ShapedWorker(name="first"), ShapedWorker(name="second", is_asleep=is_asleep)]
    workers = {worker.name: FakeHandle(worker) for worker in replicas}
    settings = {"models": MODELS, "base_model": PACKAGED_MODEL} | settings
    async with real_app(folder, workers, **settings) as (client, served):
        yield Case(client, served, workers)


@asynccontextmanager
async def two_bases(folder: Path, **settings: Any) -> AsyncIterator[Case]:
    """Publish the adapters of both, then yield the application."""
    async with serving(folder, **settings) as case:
        for name, base_model in ADAPTERS.items():
            answer = await case.publish(folder, name, base_model)
            assert answer.status_code == 201, answer.text
        for name, handle in case.workers.items():
            probed = sum(len(digests) for (digests,) in handle.called("probe_many"))
            assert probed == list(ADAPTERS.values()).count(name), "each is probed on its own base model"
        case.take_jobs()
        yield case


async def test_auto_answers_on_the_base_of_the_best_adapter_with_its_template(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as case:
        for prompt, base_model, best, template in (
            ("Write a poem.", "first", "poet", "alpaca"),
            ("Write a function.", "second", "coder", "chat"),
        ):
            answer = await case.chat(prompt)
            assert answer.status_code == 200, answer.text
            [(used, job)] = case.take_jobs()
            assert (used, job.plan.base_model, job.template) == (base_model, base_model, template)
            names = [row.ref.name for row in job.plan.adapters]
            assert names[0] == best and {ADAPTERS[name] for name in names} == {base_model}
            shown = answer.json()["lora"]
            assert shown["base_model"] == base_model
            again = await case.chat(prompt, lora={"plan": shown})
            assert (again.status_code, case.take_jobs()[0][0]) == (200, base_model)


async def test_the_model_chooses_the_base_and_without_a_fit_the_first_answers(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as case:
        no_fit = {"lora": {"min_score": 1.0}}
        for model, options, base_model, names in (
            ("auto", no_fit, "first", []),
            ("auto", {"lora": {"min_score": 1.0, "fallback": "second"}}, "second", []),
            ("second:auto", {"lora": {"min_score": 1.0, "fallback": "second"}}, "second", []),
            ("second:auto", no_fit, "second", []),
            ("second:auto", {}, "second", ["coder"]),
            ("second", {}, "second", []),
            ("first", {}, "first", []),
            ("coder", {}, "second", ["coder"]),
            ("second:coder", {}, "second", ["coder"]),
        ):
            answer = await case.chat("Hello, poem and song!", model=model, **options)
            assert answer.status_code == 200, answer.text
            [(used, job)] = case.take_jobs()
            assert (used, [row.ref.name for row in job.plan.adapters]) == (base_model, names), model
        for asked, code in (
            ({"model": "first:coder"}, "invalid_request"),
            ({"model": "first:auto", "lora": {"adapters": [{"name": "coder"}]}}, "invalid_request"),
            ({"lora": {"adapters": [{"name": "coder"}, {"name": "poet"}]}}, "invalid_request"),
            ({"lora": {"fallback": "third"}}, "invalid_request"),
            ({"model": "first:auto", "lora": {"fallback": "second"}}, "invalid_request"),
            ({"model": "third:auto"}, "model_not_found"),
        ):
            answer = await case.chat("Hello!", **asked)
            status = 404 if code == "model_not_found" else 400
            assert (answer.status_code, error_of(answer)["code"]) == (status, code)
        assert case.take_jobs() == []


async def test_texts_and_token_ids_go_to_the_tokenizer_of_their_base(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as case:
        for model, base_model in (
            ("second", "second"),
            ("coder", "second"),
            ("auto", "second"),
            ("first:auto", "first"),
        ):
            body = {"model": model, "messages": [{"role": "user", "content": "Fix this loop."}]}
            for path, asked in (("/tokenize", body), ("/tokenize", {"model": model, "prompt": "Fix this loop."})):
                answer = await case.client.post(path, json=asked)
                assert answer.status_code == 200, answer.text
                used = [name for name, handle in case.workers.items() if handle.called("tokenize")]
                assert used == [base_model], (model, asked)
                case.take_jobs()
        ids = list(map(ord, "Fix this loop."))
        for path, asked in (("/detokenize", {"tokens": ids}), ("/v1/completions", {"prompt": ids, "max_tokens": 4})):
            answer = await case.client.post(path, json={"model": "auto", **asked})
            assert answer.status_code == 400
            assert "token ids need a model that names their base model, as 'first:auto'" in error_of(answer)["message"]
            for model in ("second:auto", "coder", "second"):
                answer = await case.client.post(path, json={"model": model, **asked})
                assert answer.status_code == 200, answer.text
                assert not case.workers["first"].calls
                case.take_jobs()


async def test_lists_cards_and_names_know_the_base_of_each_model(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as case:
        policy = {"model": "second:auto", "temperature": 0}
        assert (await case.client.put("/v1/names/code", json=policy)).status_code == 200
        named = {"by-model": {"model": "coder"}, "by-list": {"lora": {"adapters": [{"name": "coder"}]}}, "own": {}}
        for name, fields in named.items():
            assert (await case.client.put(f"/v1/names/{name}", json=fields)).status_code == 200
        taken = await case.client.put("/v1/names/second", json=policy)
        assert (taken.status_code, error_of(taken)["code"]) == (409, "name_taken")
        cards = {card["id"]: card for card in (await case.client.get("/v1/models")).json()["data"]}
        assert list(cards) == ["auto", "first", "second", *sorted([*named, "code"]), "coder", "lyricist", "poet"]
        for name, base_model in (("by-model", "second"), ("by-list", "second"), ("own", "first")):
            assert cards[name]["parent"] == base_model
            assert (await case.client.get(f"/v1/models/{name}")).json() == cards[name]
        parents = [cards[name]["parent"] for name in ("auto", "first", "second", "code", "coder", "poet")]
        assert parents == ["first", None, None, "second", "second", "first"]
        assert (cards["coder"]["template"], cards["coder"]["sampling_defaults"]) == ("chat", {"top_k": 7})
        assert (await case.client.get("/v1/models/second:coder")).json()["parent"] == "second"
        assert (await case.client.get("/v1/models/first:coder")).status_code == 404
        await case.chat("Write a poem.", model="code")
        assert [name for name, _ in case.take_jobs()] == ["second"]
        response = (await case.client.post("/v1/responses", json={"model": "code", "input": "Write a loop."})).json()
        assert response["temperature"] == 0
        long = "x" * (64 * 128 + 1)
        assert [(await case.chat(long, model=model)).status_code for model in ("first", "second", "auto")] == [
            400,
            200,
            200,
        ]


async def test_a_base_whose_workers_are_away_fails_nothing_of_the_other(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as case:
        [worker] = case.workers["second"].replicas
        assert isinstance(worker, ShapedWorker)
        worker.is_away, worker.failure, worker.events = True, RayActorError(), [RayActorError()]
        ready = (await case.client.get("/ready")).json()
        assert (ready["status"], ready["models"]) == ("ready", {"first": "ready", "second": "unavailable"})
        assert (await case.publish(tmp_path / "new", "poet", "first")).status_code == 201
        refused = await case.publish(tmp_path / "new", "coder", "second")
        assert refused.status_code >= 500, refused.text
        assert (await case.chat("Write a poem.")).status_code == 200
        assert (await case.chat("Write a function.")).status_code >= 500
        stats = (await case.client.get("/v1/stats")).json()
        assert list(stats["models"]) == ["first", "second"] and stats["workers"]["num_running"] == 6


async def test_the_prompts_of_a_request_may_need_both_bases_and_count_for_their_own(tmp_path: Path) -> None:
    async with two_bases(tmp_path, cache_dir=tmp_path / "cache", usage_days=1) as case:
        prompts = ["Write a poem.", "Write a function.", "Write a song."]
        body = {"model": "auto", "prompt": prompts, "n": 2, "lora": {"k": 1}}
        answer = await case.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        bases = [choice["lora"]["base_model"] for choice in answer.json()["choices"]]
        assert bases == ["first", "first", "second", "second", "first", "first"]
        events = {
            event["base"]: event for event in events_in(tmp_path / "cache") if event["route"] == "/v1/completions"
        }
        jobs = case.take_jobs()
        assert sorted(name for name, _ in jobs) == sorted(bases)
        job = jobs[0][1]
        assert {base: (len(event["adapters"]), event["request_id"]) for base, event in events.items()} == {
            "first": (2, job.request_id),
            "second": (1, job.request_id),
        }
        assert events["first"]["completion_tokens"] == 2 * events["second"]["completion_tokens"] > 0
        total = answer.json()["usage"]["completion_tokens"]
        assert sum(event["completion_tokens"] for event in events.values()) == total


async def test_route_searches_the_base_that_its_model_names(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as case:
        for model, expected in (("auto", ["coder"]), ("first:auto", ["poet"]), ("second:coder", ["coder"])):
            lora = {"k": 1} if model.endswith("auto") else {}
            answer = await case.client.post(
                "/v1/route", json={"prompt": PROMPTS["coder"], "model": model, "lora": lora}
            )
            plans = answer.json()["data"]
            bases = {ADAPTERS[name] for name in expected}
            assert {plan["base_model"] for plan in plans} == bases, model
            assert {row["name"] for plan in plans for row in plan["adapters"]} <= {*ADAPTERS} - {"coder"} | set(
                expected
            )
        missing = await case.client.post("/v1/route", json={"prompt": "Hi", "model": "third:auto"})
        assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


async def test_a_trial_across_base_models_is_refused(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as case:
        offered = await case.publish(tmp_path / "other", "poet", "second", share=0.5)
        assert (offered.status_code, error_of(offered)["code"]) == (400, "adapter_refused"), offered.text
        assert (
            "the live version is for the base model 'first' and this one for 'second'" in error_of(offered)["message"]
        )
        assert (await case.publish(tmp_path / "other", "poet", "second")).status_code == 201
        older = (await case.client.get("/v1/loras/poet")).json()["versions"][1]["digest"]
        started = await case.client.post("/v1/loras/poet/share", json={"digest": older, "share": 0.5})
        assert (started.status_code, error_of(started)["code"]) == (400, "adapter_refused"), started.text


async def test_a_base_that_sleeps_is_waited_for_by_its_own_requests_only(tmp_path: Path) -> None:
    asleep = {"worker_scaling": {"autoscaling_config": {"min_replicas": 0}}}
    models = (MODELS[0], {**MODELS[1], **asleep})
    async with serving(tmp_path, is_asleep=True, models=models, scale_from_zero_timeout_s=0.01) as case:
        assert (await case.publish(tmp_path, "poet", "first")).status_code == 201
        refused = await case.publish(tmp_path, "coder", "second")
        asked = await case.chat("Write a function.", model="second")
        for answer in (refused, asked):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "not_ready"), answer.text
            assert int(answer.headers["retry-after"]) > 0
        assert (await case.chat("Write a poem.")).status_code == 200
        assert [name for name, _ in case.take_jobs()] == ["first"]
