"""Keys and roles, over the routes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request

from deployments.auth.authenticator import ROLES
from deployments.errors import KeyRefused
from deployments.http.dependencies import find_caller
from deployments.http.middleware import Admission
from deployments.observability.request_context import RequestContext
from gpu_worker.errors import DeadlineExceeded, EngineStopped
from tests.deployments.adapter_records import POOL, adapter
from tests.deployments.all_routes import (
    APP,
    OPEN_ROUTES,
    ROLES_OF,
    documented,
    example_path,
    guarded,
    mounted,
)
from tests.deployments.app_fakes import http_of, serve_plainly, with_context
from tests.deployments.asking import asked, error_of, get, post
from tests.deployments.console_fakes import MappedRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import DELTAS, FakeWorker
from tests.deployments.key_files import bearer, entry, keys_of_all_roles, write
from tests.soak import Scale
from tests.virtual_time import in_virtual_time

GONE = {"name": "poet", "digest": "0" * 64, "weight": 1.0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
NEEDS = {(method, example_path(path)): role for (method, path), role in ROLES_OF.items()}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/route": {"prompt": "Hi"},
    "/v1/embeddings": {"model": "multilingual-e5-small-tasks", "input": "Hi"},
    "/v1/loras/x": {"visibility": "public"},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "/x"},
    "/v1/unload_lora_adapter": {"lora_name": "x"},
    "/v1/pool/reindex": {"encoder": "multilingual-e5-small-tasks"},
    "/v1/pool/map": {"prompt": "Hi"},
}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return keys_of_all_roles(tmp_path)


def test_the_routes_are_the_known_ones() -> None:
    assert mounted().keys() == ROLES_OF.keys() | OPEN_ROUTES, "list each route with its role in all_routes.ROLES_OF"
    assert len(guarded()) == len(ROLES_OF) >= 21
    in_document = {(method, path.replace(":path}", "}")) for method, path in ROLES_OF} | {
        ("GET", "/health"),
        ("GET", "/ready"),
    }
    assert documented() == in_document


@pytest.mark.parametrize("sent", [None, "Bearer", "Bearer wrong", "Basic all", "all", "Bearer all extra"])
async def test_without_a_valid_key_every_route_answers_401_before_reading_the_body(
    keys: Path, sent: str | None
) -> None:
    headers = {} if sent is None else {"Authorization": sent}
    async with asked(keys_file=keys) as (client, _):
        num_asked = 0
        for method, path in guarded():
            response = await client.request(method, example_path(path), content=b"{", headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key"), path
            assert response.headers["www-authenticate"] == "Bearer"
            num_asked += 1
        assert num_asked == len(ROLES_OF)
        assert (await client.get("/v1/no/such/route", headers=headers)).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_valid_key_is_accepted_from_any_address(keys: Path, scheme: str) -> None:
    response = get("/v1/models", keys_file=keys, host="192.0.2.7", headers={"Authorization": f"{scheme} infer"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("authorization", "key", "status"),
    [
        ("Basic dXNlcjpwdw==", "infer", 200),
        ("Basic dXNlcjpwdw==", "wrong", 401),
        ("Bearer infer", "wrong", 200),
        ("bearer wrong", "infer", 401),
    ],
)
def test_a_key_beside_another_kind_of_authorization_is_read(
    keys: Path, authorization: str, key: str, status: int
) -> None:
    headers = {"Authorization": authorization, "x-api-key": key}
    assert get("/v1/models", keys_file=keys, headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/openapi.json"])
def test_routes_without_pool_data_need_no_key(keys: Path, path: str) -> None:
    assert get(path, keys_file=keys).status_code == 200


def test_with_keys_ready_returns_only_the_status(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").touch()
    response = get("/ready", keys_file=keys, preload=(tmp_path,))
    assert (response.status_code, response.json()) == (200, {"status": "ready"})
    assert get("/ready", keys_file=keys, headers=bearer("all")).json() == {"status": "ready"}


def test_the_api_description_mentions_the_key_and_the_upload_of_files() -> None:
    described = APP.openapi()
    publish = described["paths"]["/v1/loras"]["post"]
    assert publish["security"] == [{"HTTPBearer": []}]
    assert publish["requestBody"]["content"].keys() == {"multipart/form-data", "application/json"}
    assert "security" not in described["paths"]["/health"]["get"]


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_allows_its_routes_and_no_others(keys: Path, role: str) -> None:
    async with asked(keys_file=keys, publish_paths=True, headers=bearer(role)) as (client, _):
        for (method, path), needed in NEEDS.items():
            body = {"json": BODIES.get(path, {})} if method in ("POST", "PATCH") else {}
            response = await client.request(method, path, **body)
            assert (response.status_code == 403) is (needed not in (None, role)), (method, path, response.text)
            if response.status_code == 403:
                assert error_of(response)["code"] == "permission_denied"


@pytest.mark.parametrize(
    ("sent", "noted"),
    [
        ({}, None),
        ({"Authorization": "Bearer none"}, "authorization"),
        ({"x-api-key": "none"}, "x-api-key"),
        ({"Authorization": "Bearer none", "x-api-key": "none"}, "authorization"),
    ],
)
def test_a_key_is_noted_as_ignored_where_there_are_none(keys: Path, sent: dict[str, str], noted: str | None) -> None:
    for path in ("/v1/models", "/v1/nowhere"):
        assert get(path, headers=sent).headers.get("x-ignored-headers") == noted
    assert "x-ignored-headers" not in get("/v1/models", keys_file=keys, headers=bearer("all")).headers


def test_a_route_reached_without_the_middleware_has_no_caller() -> None:
    scope = {"type": "http", "state": {"context": RequestContext("r", "none")}, "headers": []}
    with pytest.raises(KeyRefused):
        asyncio.run(find_caller(Request(scope)))


@pytest.mark.parametrize("prefix", ["", "/live"])
async def test_the_middleware_works_for_a_mounted_application(keys: Path, prefix: str) -> None:
    served = serve_plainly(keys_file=keys)
    statuses: list[int] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        statuses.append(0)

    async def send(message: Any) -> None:
        statuses.append(message.get("status", -1))

    services = served.services
    admission = Admission(inner, services.config, services.authenticator, services.in_flight)
    guarded_app = with_context(admission)
    async with http_of(served):
        for path in ("/v1/models", "/health"):
            scope: dict[str, Any] = {"type": "http", "method": "GET", "path": prefix + path, "root_path": prefix}
            scope["headers"] = [(b"host", b"localhost")]
            await guarded_app(scope, None, send)  # type: ignore[arg-type]
    assert statuses == [401, -1, 0]


async def test_without_keys_every_client_is_the_local_tenant(tmp_path: Path) -> None:
    async with asked() as (client, served):
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        [([routed],)] = served.retriever.called("route")
        assert routed.tenant == "local"
        await client.post("/v1/loras", json={"path": str(tmp_path / "mine")})
        [([staged], _, _, actor, _, share, _)] = served.store.called("commit")
        assert (staged.ref.tenant, actor, share) == ("local", "local", None)
        [(upload, _)] = served.store.called("stage")
        assert upload.visibility or upload.default_visibility == "public"


async def test_a_key_publishes_privately_for_its_tenant_by_default(tmp_path: Path) -> None:
    limits = {"max_adapters": 7}
    keys = write(tmp_path / "keys.json", entry("k", roles=["publish"], limits=limits))
    async with asked(keys_file=keys, host="192.0.2.7", headers=bearer("k")) as (client, served):
        files = [("files", ("adapter_config.json", b"{}"))]
        for data in ({"name": "a"}, {"name": "b", "visibility": "public"}):
            response = await client.post("/v1/loras", files=files, data=data)
            assert response.status_code == 201, response.text
        uploads = [upload for upload, _ in served.store.called("stage")]
        assert [upload.tenant for upload in uploads] == ["acme", "acme"]
        assert [upload.visibility or upload.default_visibility for upload in uploads] == ["private", "public"]
        for *_, actor, _, share, _ in served.store.called("commit"):
            assert (actor, share.max_adapters) == ("id-k", 7)
        for groups, tenants in served.retriever.called("embed"):
            assert (len(groups), tenants) == (1, ["acme"])


def test_with_keys_server_folders_are_published_only_if_allowed(keys: Path) -> None:
    response = post("/v1/loras", {"path": "/x"}, keys_file=keys, headers=bearer("all"))
    assert (response.status_code, error_of(response)["code"]) == (403, "permission_denied")
    assert (
        post("/v1/loras", {"path": "/x"}, keys_file=keys, publish_paths=True, headers=bearer("all")).status_code == 201
    )


async def test_a_visibility_is_changed_by_its_own_tenant(keys: Path) -> None:
    mine = adapter("poet", tenant="acme")
    store = FakeStore({("acme", "poet"): (mine,), ("local", "theirs"): (POOL[0],)})
    async with asked(keys_file=keys, store=store, headers=bearer("all")) as (client, served):
        response = await client.patch("/v1/loras/poet", json={"visibility": "private"})
        assert response.json() == {
            "name": "poet",
            "visibility": "private",
            "generation": 8,
            "replicas": {"ready": 1, "behind": 0},
        }
        assert served.store.called("set_visibility") == [("acme", "poet", "private", "id-all")]
        for name in ("theirs", "local/theirs", "nobody"):
            response = await client.patch(f"/v1/loras/{name}", json={"visibility": "private"})
            assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
        response = await client.patch("/v1/loras/poet", json={"visibility": "secret"})
        assert (response.status_code, error_of(response)["param"]) == (400, "visibility")


async def test_without_the_keys_file_requests_are_503_once_the_grace_period_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.auth.key_file.MISSING_GRACE_S", 0.0)
    path = write(tmp_path / "keys.json", entry("all"))
    async with asked(keys_file=path, headers=bearer("all")) as (client, _):
        assert (await client.get("/v1/models")).status_code == 200
        path.unlink()
        response = await client.get("/v1/models")
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
        assert str(tmp_path) not in response.text
        assert (await client.get("/health")).status_code == 200


async def test_the_openai_client_raises_its_usual_errors(tmp_path: Path) -> None:
    keys = write(
        tmp_path / "keys.json",
        entry("once", limits={"requests_per_minute": 1}),
        entry("reader", roles=["publish"]),
    )
    async with asked(keys_file=keys) as (client, _):

        async def chat(key: str) -> Any:
            own = openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=client, max_retries=0)
            return await own.chat.completions.create(model="auto", messages=CHAT["messages"])  # type: ignore[arg-type]

        with pytest.raises(openai.AuthenticationError) as unknown:
            await chat("wrong")
        assert unknown.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):
            await chat("reader")
        assert (await chat("once")).choices[0].message.content == "Hello"
        with pytest.raises(openai.RateLimitError) as limited:
            await chat("once")
        assert 55 <= int(limited.value.response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("options", "body", "status", "times"),
    [
        ({}, {"lora": {"plan": {"strategy": "selection", "adapters": [GONE]}}}, 409, 1),
        ({"worker": FakeWorker([DeadlineExceeded(0)] * 3)}, {}, 504, 1),
        ({"worker": FakeWorker([EngineStopped("it stopped")] * 3)}, {}, 503, 2),
    ],
    ids=["a plan that is gone", "an exceeded deadline", "a part that is unavailable"],
)
@in_virtual_time
async def test_the_openai_client_retries_only_if_that_can_help(
    keys: Path, options: dict[str, Any], body: dict[str, Any], status: int, times: int
) -> None:
    async with asked(keys_file=keys, **options) as (client, _):
        seen: list[int] = []

        async def count(response: httpx.Response) -> None:
            seen.append(response.status_code)

        client.event_hooks = {"response": [count]}
        own = openai.AsyncOpenAI(base_url="http://test/v1", api_key="all", http_client=client, max_retries=1)
        with pytest.raises(openai.APIStatusError):
            await own.chat.completions.create(model="auto", **CHAT, extra_body=body)
        assert seen == [status] * times


async def test_a_running_stream_counts_until_its_client_leaves(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k", limits={"concurrent_requests": 1}))
    async with asked(keys_file=keys, headers=bearer("k")) as (client, served):
        caller = served.services.authenticator.authenticate("Bearer k")
        chunks = served.ingress.stream(CHAT, caller)
        await anext(chunks)
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/route", {"prompt": "hi"})):
            response = await client.post(path, json=body)
            assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded"), path
            assert response.headers["retry-after"] == "1"
        await chunks.aclose()
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_used_tokens_are_charged_not_requested_ones(tmp_path: Path, stream: bool) -> None:
    keys = write(tmp_path / "keys.json", entry("k", limits={"tokens_per_minute": 100}))
    body = CHAT | {"max_tokens": 80, "stream": stream}
    async with asked(keys_file=keys, headers=bearer("k")) as (client, _):
        for _turn in range(2):  # 8 tokens each
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
        response = await client.post("/v1/chat/completions", json=body | {"max_tokens": 90})
        assert response.status_code == 429
        response = await client.post("/v1/chat/completions", json=body | {"max_tokens": 101})
        assert (response.status_code, error_of(response)["param"]) == (400, "max_tokens")


async def test_a_failed_request_is_charged_its_usage(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k", limits={"tokens_per_minute": 100}))
    worker = FakeWorker(events=(DELTAS[0], TimeoutError()))
    async with asked(keys_file=keys, worker=worker, headers=bearer("k")) as (client, _):
        for _turn in range(3):
            response = await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 80})
            assert response.status_code == 503


async def test_no_valid_key_fails_while_keys_rotate(tmp_path: Path, scale: Scale) -> None:
    """Each key is added next to the previous one, used as soon as the file is written, and then alone in it."""
    num_rotations = scale.pick("rotations", small=10, full=500)
    path = write(tmp_path / "keys.json", entry("k0"))
    served = serve_plainly(keys_file=path)
    valid, num_asked, done = ["k0"], 0, False

    async def client_task(client: httpx.AsyncClient) -> None:
        nonlocal num_asked
        while not done:
            response = await client.get("/v1/models", headers=bearer(valid[-1]))
            assert response.status_code == 200, response.text
            num_asked += 1
            await asyncio.sleep(0)  # over fakes a request may end without waiting for anything

    async with http_of(served) as client, asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(client_task(client))
        for number in range(1, num_rotations + 1):
            old, new = f"k{number - 1}", f"k{number}"
            await asyncio.to_thread(write, path, entry(old), entry(new))
            valid.append(new)
            seen = num_asked
            while num_asked < seen + 16:  # requests with the old key have been answered
                await asyncio.sleep(0)
            await asyncio.to_thread(write, path, entry(new))
            gone = await client.get("/v1/models", headers=bearer(old))
            assert gone.status_code == 401
        done = True
    assert num_asked >= 16 * num_rotations


async def test_answers_tell_the_rate_and_polling_the_models_uses_none_of_it(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k", limits={"requests_per_minute": 2}), entry("free"))
    async with asked(keys_file=keys, headers=bearer("k")) as (client, _):
        for path in ("/v1/models", "/v1/models/auto", "/v1/models?limit=20&name=") * 2:
            response = await client.get(path)
            assert (response.status_code, response.headers["x-ratelimit-remaining-requests"]) == (200, "2"), path
        left = []
        for _ in range(3):
            response = await client.post("/v1/chat/completions", json=CHAT)
            left.append((response.status_code, response.headers["x-ratelimit-remaining-requests"]))
            assert response.headers["x-ratelimit-limit-requests"] == "2"
        assert left == [(200, "1"), (200, "0"), (429, "0")]
        assert (await client.post("/v1/models")).status_code == 429, "only reading is free"
        for headers in (bearer("free"), bearer("wrong")):
            response = await client.get("/v1/models", headers=headers)
            assert not [name for name in response.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/loras", "/v1/pool/map"),
        *("/v1/models?name=a", "/v1/models?tag=a", "/v1/models?owner=acme", "/v1/models?after=auto"),
    ],
)
async def test_polling_a_list_uses_up_the_keys_requests(path: str, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k", limits={"requests_per_minute": 1}))
    async with asked(keys_file=keys, headers=bearer("k"), retriever=MappedRetriever()) as (client, _):
        assert [(await client.get(path)).status_code for _ in range(2)] == [200, 429]
