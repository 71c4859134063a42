"""Keys are charged for work, not for requests: rows, and text that the encoder reads, on every route that uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.errors import EncoderBusy
from gpu_worker.config import NativeSettings
from gpu_worker.errors import DeadlineExceeded, EngineFull, PromptTooLong
from gpu_worker.front.request.request import Tokenized
from retriever_svc import Place, Route, RouteRequest, StaleIndex
from retriever_svc.encoder import MAX_TOKENS
from tests.deployments.adapter_records import BASE
from tests.deployments.app_fakes import Served
from tests.deployments.asking import asked, error_of
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.fake_worker import FakeWorker
from tests.deployments.key_files import bearer, entry, write

Request = tuple[str, dict[str, Any]]
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


async def served_to(
    tmp_path: Path, limits: dict[str, int], *requests: Request, **options: Any
) -> tuple[list[httpx.Response], Served]:
    """Return the responses to these requests, one after the other, by a key with these limits."""
    keys = write(tmp_path / "keys.json", entry("k", limits=limits))
    options.setdefault("retriever", MappedRetriever())
    async with asked(keys_file=keys, headers=bearer("k"), **options) as (client, served):
        return [await client.post(path, json=body) for path, body in requests], served


async def statuses(tmp_path: Path, limits: dict[str, int], *requests: Request, **options: Any) -> list[int]:
    answers, _ = await served_to(tmp_path, limits, *requests, **options)
    return [answer.status_code for answer in answers]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/route", {"prompt": ["x" * 16_000] * 256}),
        ("/v1/route", {"prompt": "Hi", "lora": {"query": "x" * 44}}),
        ("/v1/pool/map", {"prompt": "x" * 44}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "lora": {"query": "x" * 44}}),
        ("/v1/chat/completions", CHAT | {"lora": {"query": "x" * 44}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_more_text_than_the_key_may_use_never_reaches_the_encoder(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    [response], served = await served_to(tmp_path, {"tokens_per_minute": 10}, (path, body))
    assert response.status_code == 400
    assert "the key allows 10 per minute" in error_of(response)["message"]
    assert not served.retriever.called("route") and not served.retriever.called("place")


async def test_each_text_is_charged_a_third_of_its_bytes_as_far_as_the_encoder_reads_it(tmp_path: Path) -> None:
    route = ("/v1/route", {"prompt": ["x" * 3, "語x", "x"]})  # 1 + 2 + 1
    place = ("/v1/pool/map", {"prompt": "x" * 13})  # 5
    last = ("/v1/route", {"prompt": "xxxx"})  # 2, and 1 is left
    assert await statuses(tmp_path, {"tokens_per_minute": 10}, route, place, last) == [200, 200, 429]
    long = ("/v1/route", {"prompt": "x" * (8 * MAX_TOKENS)})
    assert await statuses(tmp_path, {"tokens_per_minute": MAX_TOKENS}, long, long) == [200, 429]
    named = ("/v1/route", {"prompt": "x" * 400, "lora": {"adapters": [{"name": "poet"}]}})
    assert await statuses(tmp_path, {"tokens_per_minute": 10}, named, named) == [200, 200], "it is not encoded"


async def test_a_long_prompt_is_charged_for_every_part_that_is_read(tmp_path: Path) -> None:
    prompt = "\n\n".join(letter * 300 for letter in "xyz")
    num_tokens = 256 + 2 * 100 + 2 * 201  # the whole; each end; each end with the middle
    route, place = ("/v1/route", {"prompt": prompt}), ("/v1/pool/map", {"prompt": "x" * 4})
    assert await statuses(tmp_path, {"tokens_per_minute": num_tokens + 1}, route, place) == [200, 429]
    assert await statuses(tmp_path, {"tokens_per_minute": num_tokens + 2}, route, place) == [200, 200]


TWO_ROWS = {"concurrent_requests": 2}
FEW_TOKENS = {"tokens_per_minute": 15}


@pytest.mark.parametrize(
    ("limits", "path", "body", "param"),
    [
        (TWO_ROWS, "/v1/completions", {"prompt": ["a"] * 3}, "prompt"),
        (TWO_ROWS, "/v1/completions", {"prompt": ["a", "b"], "n": 2}, "n"),
        (TWO_ROWS, "/v1/chat/completions", CHAT | {"n": 3}, "n"),
        (TWO_ROWS, "/v1/route", {"prompt": ["a"] * 3}, "prompt"),
        (FEW_TOKENS, "/tokenize", {"prompt": "x" * 61}, "prompt"),
        (FEW_TOKENS, "/tokenize", {"messages": [{"role": "user", "content": "x" * 61}], "model": BASE}, "messages"),
        (FEW_TOKENS, "/detokenize", {"tokens": [120] * 16}, "tokens"),
    ],
)
async def test_a_request_above_a_limit_of_its_key_is_refused_by_its_field(
    tmp_path: Path, limits: dict[str, int], path: str, body: dict[str, Any], param: str
) -> None:
    [[response], _] = await served_to(tmp_path, limits, (path, body))
    error, [limit] = error_of(response), limits.values()
    assert (response.status_code, error["param"]) == (400, param) and f"the key allows {limit} " in error["message"]


async def test_rows_of_all_requests_count_together(tmp_path: Path) -> None:
    keys, worker = write(tmp_path / "keys.json", entry("k", limits={"concurrent_requests": 4})), CountingWorker()
    fakes: dict[str, Any] = {"worker": worker, "retriever": MappedRetriever()}
    requests = [("/v1/route", {"prompt": "a"}), ("/v1/pool/map", {"prompt": "a"}), ("/v1/chat/completions", CHAT)]
    async with asked(keys_file=keys, headers=bearer("k"), **fakes) as (client, served):
        worker.goes_on = asyncio.Event()
        running = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2}))
        while len(served.worker.called("stream")) < 4:
            await asyncio.sleep(0)
        assert [(await client.post(path, json=body)).status_code for path, body in requests] == [429] * 3
        worker.goes_on.set()
        assert (await running).status_code == 200
        assert [(await client.post(path, json=body)).status_code for path, body in requests] == [200] * 3


async def test_placing_a_prompt_on_the_map_requires_the_role_infer(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k", roles=["publish", "admin"]))
    async with asked(retriever=MappedRetriever(), keys_file=keys, headers=bearer("k")) as (client, served):
        assert (await client.get("/v1/pool/map")).status_code == 200
        response = await client.post("/v1/pool/map", json={"prompt": "a"})
        assert (response.status_code, error_of(response)["code"]) == (403, "permission_denied")
        assert not served.retriever.called("place")


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/route", {"prompt": ["a", "x" * 641]}), ("/v1/pool/map", {"prompt": "x" * 641})]
)
async def test_texts_too_long_for_a_prompt_are_neither_routed_nor_placed(path: str, body: dict[str, Any]) -> None:
    async with asked(retriever=MappedRetriever(), engine=NativeSettings(max_model_len=10)) as (client, served):
        response = await client.post(path, json=body)
        assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
        assert not served.retriever.called("route") and not served.retriever.called("place")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/loras", {"path": "/folders/new"}),
        ("/v1/loras", {"adapters": [{"path": "/folders/new"}, {"path": "/folders/newer"}]}),
        ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "/folders/new"}),
    ],
)
async def test_samples_of_a_publish_are_charged_to_its_key(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    [[response], served] = await served_to(tmp_path, {"tokens_per_minute": 1}, (path, body), publish_paths=True)
    assert (response.status_code, error_of(response)["param"]) == (400, "samples")
    called = [served.store.called("stage"), served.retriever.called("embed"), served.store.called("commit")]
    assert list(map(bool, called)) == [True, False, False]


async def test_a_key_is_charged_the_usage_of_the_answer(tmp_path: Path) -> None:
    body = {"prompt": ["Hi", "Ho"], "model": BASE, "max_tokens": 3, "n": 4}  # 27 reserved, 34 used
    answers, _ = await served_to(tmp_path, {"tokens_per_minute": 61}, *[("/v1/completions", body)] * 3)
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].json()["usage"]["total_tokens"] == 2 * 5 + 8 * 3


@pytest.mark.parametrize(
    ("error", "stream", "expected"),
    [
        (PromptTooLong("4000 prompt tokens do not fit a context of 2048"), False, [400, 400, 429]),
        (PromptTooLong("4000 prompt tokens do not fit a context of 2048"), True, [400, 400, 429]),
        (DeadlineExceeded(0), False, [504, 504, 429]),
        (EngineFull("full"), False, [503, 503, 503]),
    ],
)
async def test_a_request_that_ends_before_its_first_token_is_charged_its_prompt_once_unless_there_was_no_room(
    tmp_path: Path, error: Exception, stream: bool, expected: list[int]
) -> None:
    asks = ("/v1/completions", {"prompt": "x" * 400, "model": BASE, "max_tokens": 1, "n": 4, "stream": stream})
    worker = FakeWorker(events=(error,))
    assert await statuses(tmp_path, {"tokens_per_minute": 250}, asks, asks, asks, worker=worker) == expected


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "x" * 60}), ("/detokenize", {"tokens": [120] * 60, "model": BASE})]
)
async def test_tokens_are_charged_and_a_key_without_any_left_does_not_use_the_worker(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    answers, served = await served_to(tmp_path, {"tokens_per_minute": 61}, *[(path, body)] * 3)
    assert [answer.status_code for answer in answers] == [200, 429, 429]
    assert len(served.worker.called(path.strip("/"))) == 1


@pytest.mark.parametrize("field", ["prompt", "messages"])
async def test_a_text_above_eight_characters_a_token_of_the_context_is_not_tokenized(field: str) -> None:
    def body(num_chars: int) -> dict[str, Any]:
        text = "x" * num_chars
        return {field: text if field == "prompt" else [{"role": "user", "content": text}], "model": BASE}

    async with asked(engine=NativeSettings(max_model_len=10)) as (client, served):
        assert (await client.post("/tokenize", json=body(80))).status_code == 200
        response = await client.post("/tokenize", json=body(81))
        assert len(served.worker.called("tokenize")) == 1
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
    assert error["message"].startswith(f"{field}: at most 80 characters, 8 for each token of the context, got 81")


class FullTokenizer(FakeWorker):
    async def tokenize(self, *asked: Any) -> Tokenized:
        raise EngineFull("full")


async def test_a_text_that_the_server_has_no_room_for_is_not_charged(tmp_path: Path) -> None:
    asks = ("/tokenize", {"prompt": "x" * 400})
    assert await statuses(tmp_path, {"tokens_per_minute": 150}, asks, asks, worker=FullTokenizer()) == [503, 503]


class RefusingRetriever(MappedRetriever):
    """Refuses every call of the encoder after the first `num_read`, which find no adapter."""

    def __init__(self, error: Exception, num_read: int = 0) -> None:
        super().__init__(abstains=True)
        self._error, self._num_left = error, num_read

    def _refuse(self) -> None:
        self._num_left -= 1
        if self._num_left < 0:
            raise self._error

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        self._refuse()
        return await super().route(requests)

    async def place(self, *asked: Any) -> Place:
        self._refuse()
        return await super().place(*asked)

    async def vectors(self, *asked: Any) -> list[NDArray[np.float32]]:
        self._refuse()
        return await super().vectors(*asked)


LONG = "x" * 300  # 100 tokens for the encoder
READ = [
    ("/v1/embeddings", {"model": "multilingual-e5-small-tasks", "input": LONG}),
    ("/v1/route", {"prompt": LONG}),
    ("/v1/pool/map", {"prompt": LONG}),
    ("/v1/completions", {"prompt": LONG, "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": LONG}], "model": "auto"}),
]


@pytest.mark.parametrize(("path", "body"), READ, ids=[path for path, _ in READ])
@pytest.mark.parametrize(
    ("error", "is_charged"),
    [
        (EncoderBusy(9, has_read=False), False),
        (EncoderBusy(9, has_read=True), True),
        (StaleIndex(8, 7), False),
        (DeploymentUnavailableError(DeploymentID("Retriever")), False),
        (DeadlineExceeded(0), True),
    ],
    ids=["busy", "busy after some texts", "stale", "unavailable", "late"],
)
async def test_text_that_the_encoder_has_not_read_is_not_charged(
    tmp_path: Path, path: str, body: dict[str, Any], error: Exception, is_charged: bool
) -> None:
    retriever = RefusingRetriever(error)
    [[answer], _] = await served_to(tmp_path, {"tokens_per_minute": 500}, (path, body), retriever=retriever)
    assert answer.status_code in (503, 504)
    assert (int(answer.headers["x-ratelimit-remaining-tokens"]) < 450) == is_charged  # 100 come back in 12 s


async def test_a_conversation_is_charged_if_one_of_its_texts_was_read(tmp_path: Path) -> None:
    turns = [{"role": role, "content": LONG} for role in ("user", "assistant", "user")]
    for num_read in (0, 1):
        retriever = RefusingRetriever(EncoderBusy(9, has_read=False), num_read)
        chat = ("/v1/chat/completions", {"messages": turns, "max_tokens": 1})
        [[answer], _] = await served_to(tmp_path, {"tokens_per_minute": 900}, chat, retriever=retriever)
        assert answer.status_code == 503
        assert (int(answer.headers["x-ratelimit-remaining-tokens"]) < 850) == bool(num_read)


@pytest.mark.parametrize("body", [{"prompt": [120] * 40}, {"prompt": [120], "echo": True, "model": BASE}])
async def test_token_ids_of_a_key_without_tokens_left_are_not_decoded(tmp_path: Path, body: dict[str, Any]) -> None:
    requests = [("/tokenize", {"prompt": "x" * 100}), ("/v1/completions", body | {"max_tokens": 3})]
    answers, served = await served_to(tmp_path, {"tokens_per_minute": 100}, *requests)
    assert [answer.status_code for answer in answers] == [200, 429] and not served.worker.called("detokenize")


async def test_token_ids_that_the_encoder_reads_are_charged_one_each_at_most_what_it_reads(tmp_path: Path) -> None:
    one = ("/v1/completions", {"prompt": [120] * 40, "max_tokens": 3})  # 40 + 43 reserved; 40 + 8 used
    assert await statuses(tmp_path, {"tokens_per_minute": 130}, one, one, one) == [200, 429, 429]
    many = ("/v1/completions", {"prompt": [120] * 1000, "max_tokens": 3})
    assert await statuses(tmp_path, {"tokens_per_minute": 1003 + MAX_TOKENS}, many) == [200]
