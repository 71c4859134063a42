from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api.adapters import MAX_UPLOAD_FILES, PublishItem
from deployments.config.app import FORM_OVERHEAD_BYTES
from deployments.http.bodies import DEFAULT_MAX_BODY_BYTES
from lora_store import StoreUnavailable
from retriever_svc import DoctorStep, StaleIndex
from tests.deployments.adapter_records import adapter, pool_of
from tests.deployments.asking import asked, error_of, post, request
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore

FILES = [("files", ("adapter_config.json", b"{}")), ("files", ("adapter_model.safetensors", b"weights"))]
LATE = FakeRetriever(caught_up=StaleIndex(8, 7))


async def staged_by(sent: dict[str, Any], **options: Any) -> tuple[httpx.Response, list[PublishItem]]:
    """Publish. Return the response, and what the Store had to stage."""
    async with asked(**options) as (client, served):
        response = await client.post("/v1/loras", **sent)
    return response, [upload for upload, _ in served.store.called("stage")]


def upload(files: Any = FILES, **data: Any) -> dict[str, Any]:
    return {"files": files, "data": {"name": "singer", **data}}


@pytest.mark.parametrize("name", ["nobody", "other/poet", "local/nobody", "a/b/c"])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("POST", "/rollback")])
def test_an_unknown_adapter_is_not_found(method: str, suffix: str, name: str) -> None:
    response = request(method, f"/v1/loras/{name}{suffix}", sent={"json": {}} if suffix else {})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert name.rpartition("/")[2] in error_of(response)["message"]


async def test_a_publish_is_201_and_passes_on_the_clients_fields() -> None:
    body = {"path": "/folders/x", "name": "singer", "tags": ["fun"], "template": "chat"}
    response, [upload] = await staged_by({"json": body})
    assert response.status_code == 201
    assert (response.json()["name"], response.json()["generation"]) == ("singer", 8)
    assert upload == PublishItem(Path("/folders/x"), "singer", tags=("fun",), template="chat")


async def test_uploaded_files_are_published_unchanged() -> None:
    fields = upload(tags=["fun", "short"], template="chat")
    response, [staged] = await staged_by(fields)
    assert (response.status_code, response.json()["name"]) == (201, "singer")
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    assert staged == PublishItem(name="singer", tags=("fun", "short"), template="chat", files=files)


KEPT = PublishItem(Path("/a"), "singer")
CLEARED = PublishItem(Path("/a"), "singer", tags=(), template="server", has_samples=False)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({}, KEPT),
        ({"tags": None, "template": None, "samples": None}, KEPT),
        ({"tags": [], "template": "server", "samples": []}, CLEARED),
    ],
    ids=str,
)
async def test_a_label_that_is_absent_is_kept_and_an_empty_one_clears(
    label: dict[str, Any], expected: PublishItem
) -> None:
    _, [staged] = await staged_by({"json": {"path": "/a", "name": "singer", **label}})
    assert staged == expected
    in_form = {field: "" if value == [] else value for field, value in label.items() if value is not None}
    _, [staged] = await staged_by(upload(**in_form))
    assert replace(staged, path=Path("/a"), files=None) == expected


def test_the_answer_says_what_a_new_version_kept_and_changed() -> None:
    live = FakeStore(pool_of(adapter("poet", version="fun", template="alpaca")))
    answer = post("/v1/loras", {"path": "/a/poet", "template": "chat"}, store=live).json()
    assert answer["kept"]["tags"] == ["fun"]
    assert answer["changed"] == {"template": {"from": "alpaca", "to": "chat"}}
    assert {"kept", "changed"}.isdisjoint(post("/v1/loras", {"path": "/a/singer"}).json()), "of a new name"


def test_a_publish_that_a_replica_has_not_seen_is_202() -> None:
    response = post("/v1/loras", {"path": "/folders/singer"}, retriever=LATE)
    assert response.status_code == 202
    assert response.json()["replicas"] == {"ready": 0, "behind": 1}


async def test_a_batch_is_one_commit_with_a_result_for_each_adapter() -> None:
    async with asked() as (client, served):
        adapters = [{"path": "/a/one"}, {"source": "s3://b/bad"}, {"path": "/a/gone"}, {"path": "/a/x", "name": "two"}]
        response = await client.post("/v1/loras", json={"adapters": adapters})
        assert response.status_code == 207
        rows = response.json()["data"]
        assert [row["status"] for row in rows] == [201, 400, 404, 201]
        assert [row.get("name") for row in rows] == ["one", None, None, "two"]
        assert [row["error"]["code"] for row in rows if "error" in row] == ["adapter_refused", "adapter_refused"]
        assert len(served.store.called("commit")) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"source": "hf://acme/many@v1/poet"}, {"source": "hf://acme/many@v2/poet"}),
        ({"path": "/a/poet"}, {"source": "s3://b/poet"}),
        ({"path": "/a/poet"}, {"path": "/a/bard", "name": "poet"}),
    ],
)
async def test_a_batch_with_two_places_of_one_name_is_refused(first: dict[str, str], second: dict[str, str]) -> None:
    """Only the second would stay live, while both were reported so."""
    response, staged = await staged_by({"json": {"adapters": [{"path": "/a/other"}, first, second]}})
    error = error_of(response)
    assert (response.status_code, error["param"], staged) == (400, "adapters.2.name", [])
    places = [item.get("path") or item["source"] for item in (first, second)]
    assert all(repr(place) in error["message"] for place in places)


async def test_a_batch_may_name_one_place_twice() -> None:
    response, staged = await staged_by({"json": {"adapters": [{"path": "/a/poet"}, {"path": "/a/poet/"}]}})
    assert (response.status_code, len(staged)) == (201, 2)


@pytest.mark.parametrize(
    "sent",
    [{"json": {"path": "/a/one"}}, upload(), {"json": {"adapters": [{"path": "/a/one"}, {"path": "/a/two"}]}}],
    ids=["source", "files", "batch"],
)
async def test_a_dry_run_is_200_and_commits_nothing(sent: dict[str, Any]) -> None:
    async with asked() as (client, served):
        response = await client.post("/v1/loras", params={"dry_run": True}, **sent)
        assert response.status_code == 200, response.text
        assert served.store.called("commit") == []
        num_staged = len(served.store.called("stage"))
        assert num_staged == sum(len(staged) for (staged,) in served.store.called("discard")) > 0


@pytest.mark.parametrize(("retriever", "status"), [(FakeRetriever(), 201), (LATE, 202)])
def test_a_batch_without_errors_has_the_status_of_one_publish(retriever: FakeRetriever, status: int) -> None:
    response = post("/v1/loras", {"adapters": [{"path": "/a/one"}, {"path": "/a/two"}]}, retriever=retriever)
    assert response.status_code == status
    assert [row["status"] for row in response.json()["data"]] == [status] * 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"path": ""}, "path"),
        ({"path": "/a", "force": True}, "force"),
        ({"path": "/a", "tags": "fun"}, "tags"),
        ({"path": "/a", "samples": ["Rhyme."]}, "samples"),
        ({"adapters": [{"path": "/a"}, {"name": "x"}]}, "adapters.1"),
        ({"adapters": [{"path": "/a"}], "path": "/b"}, "path"),
        ([], None),
        ("text", None),
    ],
)
async def test_a_malformed_publish_is_refused_by_its_field_and_nothing_is_staged(body: Any, param: str | None) -> None:
    response, staged = await staged_by({"json": body})
    assert (response.status_code, error_of(response)["code"], staged) == (400, "invalid_request", [])
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"path=/a", "application/x-www-form-urlencoded", "content-type"),
        (b'{"path": "/a"}', "text/plain", "content-type"),
        (b"", "", "content-type"),
        (b"x", "multipart/form-data", "boundary"),
    ],
)
def test_an_unreadable_body_is_a_bad_request(content: bytes, kind: str, said: str) -> None:
    response = request("POST", "/v1/loras", sent={"content": content, "headers": {"content-type": kind}})
    assert response.status_code == 400
    assert said in error_of(response)["message"]


@pytest.mark.parametrize(
    ("files", "data", "code", "said"),
    [
        (FILES, {"name": None}, "invalid_request", "name"),
        (FILES, {"name": ["a", "b"]}, "invalid_request", "name: is given 2 times"),
        (FILES, {"owner": "me"}, "invalid_request", "owner"),
        (FILES, {"template": "jinja"}, "invalid_request", "template"),
        ([("weights", FILES[0][1])], {}, "invalid_request", "weights"),
        ([("files", (None, b"no file"))], {}, "invalid_request", "files"),
        ([*FILES, FILES[0]], {}, "adapter_refused", "'adapter_config.json' is given 2 times"),
        ([("files", ("../adapter_config.json", b"{}"))], {}, "adapter_refused", "'../adapter_config.json'"),
        ([("files", ("poet/adapter_config.json", b"{}"))], {}, "adapter_refused", "'poet/adapter_config.json'"),
        (FILES, {"name": "bad"}, "adapter_refused", "it is bad"),
        ([("files", (f"f{n}", b"")) for n in range(MAX_UPLOAD_FILES + 1)], {}, "http_error", "Too many files"),
        (FILES, {"tags": [str(n) for n in range(50)]}, "http_error", "Too many fields"),
        (FILES, {"name": "x" * 40_000}, "http_error", "maximum size"),
    ],
)
def test_a_bad_upload_is_refused_with_the_problem(files: Any, data: dict[str, Any], code: str, said: str) -> None:
    fields = {key: value for key, value in {"name": "singer", **data}.items() if value is not None}
    response = request("POST", "/v1/loras", sent={"files": files, "data": fields})
    assert (response.status_code, error_of(response)["code"]) == (400, code)
    assert said in error_of(response)["message"]


@pytest.mark.parametrize("kind", ["multipart/form-data", "Multipart/Form-Data"])
@pytest.mark.parametrize(("too_many", "status"), [(0, 201), (1, 413)])
async def test_an_upload_may_be_as_large_as_configured(too_many: int, status: int, kind: str) -> None:
    async with asked(admission={"max_weights_bytes": 1}) as (client, served):
        boundary = "b" * 20
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="name"\r\n\r\nsinger\r\n--{boundary}\r\n'
        head += 'content-disposition: form-data; name="files"; filename="adapter_config.json"\r\n\r\n'
        tail = f"\r\n--{boundary}--\r\n"
        limit = served.services.config.max_upload_bytes + FORM_OVERHEAD_BYTES
        filler = b"x" * (limit + too_many - len(head) - len(tail))
        content = head.encode() + filler + tail.encode()
        assert len(content) > DEFAULT_MAX_BODY_BYTES
        headers = {"content-type": f"{kind}; boundary={boundary}"}
        response = await client.post("/v1/loras", content=content, headers=headers)
    assert response.status_code == status
    if status == 413:
        assert error_of(response)["code"] == "body_too_large"


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("method", "path", "kinds"),
    [
        ("POST", "/v1/loras", ["application/json"]),
        ("POST", "/v1/loras", ["application/json", FORM]),  # the route reads what the first one says
        ("POST", "/v1/completions", [FORM]),
        ("PATCH", "/v1/loras/x/v1/loras", [FORM]),
        ("POST", "/v1/loras/x/v1/loras/rollback", [FORM]),
        ("POST", "/v1/loras/v1/loras/approve", [FORM]),
    ],
)
def test_every_other_body_is_small(method: str, path: str, kinds: list[str]) -> None:
    """Also if the path ends like an upload's, because its route would read it completely before checking roles."""
    content = b" " * (DEFAULT_MAX_BODY_BYTES + 1)
    response = request(method, path, sent={"content": content, "headers": [("content-type", kind) for kind in kinds]})
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


CHANGES = [
    ("POST", "/v1/loras", {"json": {"path": "/folders/x"}}),
    ("POST", "/v1/loras", {"json": {"source": "s3://bucket/x"}}),
    ("POST", "/v1/loras", {"json": {"adapters": [{"source": "s3://bucket/x"}]}}),
    ("POST", "/v1/loras", upload()),
    ("DELETE", "/v1/loras/poet", {}),
    ("POST", "/v1/loras/poet/rollback", {"json": {}}),
    ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "x", "lora_path": "/folders/x"}}),
    ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "x", "lora_path": "s3://bucket/x"}}),
    ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": "poet"}}),
    ("POST", "/v1/pool/verify", {"json": {}}),
    ("POST", "/v1/pool/gc", {"json": {}}),
    ("POST", "/v1/pool/doctor", {"json": {}}),
    ("POST", "/v1/pool/evaluate", {"json": {}}),
    ("POST", "/v1/pool/reindex", {"json": {"encoder": "other"}}),
]
OUTSIDE = [
    {"host": "10.0.0.1"},
    {"headers": {"x-forwarded-for": "192.0.2.7"}},
    {"headers": {"origin": "https://evil.example"}},
    {"headers": {"origin": "null"}},
]


@pytest.mark.parametrize("outside", OUTSIDE, ids=str)
async def test_only_this_machine_changes_the_pool(outside: dict[str, Any]) -> None:
    async with asked(**outside) as (client, served):
        for method, path, sent in CHANGES:
            response = await client.request(method, path, **sent)
            assert (response.status_code, error_of(response)["code"]) == (403, "permission_denied"), path
            assert ("web pages of" in error_of(response)["message"]) is ("origin" in str(outside))
        assert served.store.calls == []


@pytest.mark.parametrize(("method", "path", "sent"), CHANGES)
def test_remote_clients_may_change_it_if_allowed_but_not_name_server_folders(
    method: str, path: str, sent: dict[str, Any]
) -> None:
    names_a_folder = "/folders/x" in str(sent) or path.endswith("reindex")
    versions = adapter("poet", version="2"), adapter("poet", version="1")
    response = request(
        method,
        path,
        sent=sent,
        allow_remote_publish=True,
        store=FakeStore(pool_of(*versions)),
        retriever=FakeRetriever(steps=[[DoctorStep(0, 0)] if path.endswith("doctor") else []]),
        host="10.0.0.1",
    )
    assert (response.status_code == 403) is names_a_folder
    assert names_a_folder or response.status_code in (200, 201)


async def test_server_folders_are_published_if_allowed() -> None:
    for body in ({"path": "/folders/x"}, {"adapters": [{"source": "s3://b/x"}, {"path": "/folders/x"}]}):
        response, staged = await staged_by({"json": body}, publish_paths=False)
        assert (response.status_code, error_of(response)["code"], staged) == (403, "permission_denied", [])
    response, _ = await staged_by(upload(), publish_paths=False)
    assert response.status_code == 201


def test_a_page_of_this_machine_may_change_the_pool() -> None:
    for origin in ("http://127.0.0.1:8000", "http://localhost:3000", "http://[::1]:8000"):
        assert request("POST", "/v1/loras", sent=upload(), headers={"origin": origin}).status_code == 201


@pytest.mark.parametrize(("retriever", "status"), [(FakeRetriever(), 200), (LATE, 202)])
def test_a_withdrawal_reports_how_many_replicas_know_it(retriever: FakeRetriever, status: int) -> None:
    response = request("DELETE", "/v1/loras/local/poet", retriever=retriever)
    assert response.status_code == status
    behind = status - 200 >> 1
    assert response.json() == {
        "names": ["poet"],
        "deleted": True,
        "generation": 8,
        "replicas": {"ready": 1 - behind, "behind": behind},
    }


@pytest.mark.parametrize(
    ("method", "path", "sent", "failing"),
    [
        ("POST", "/v1/loras", {"json": {"path": "/folders/x"}}, "active_encoder"),
        ("POST", "/v1/loras", {"json": {"path": "/folders/x"}}, "stage"),
        ("POST", "/v1/loras", {"json": {"path": "/folders/x"}}, "commit"),
        ("POST", "/v1/loras", upload(), "stage"),
        ("DELETE", "/v1/loras/poet", {}, "withdraw"),
        ("POST", "/v1/loras/poet/rollback", {"json": {}}, "versions"),
        ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "x", "lora_path": "/x"}}, "versions"),
        ("POST", "/v1/pool/reindex", {"json": {"encoder": "other"}}, "ping"),
        ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": "poet"}}, "withdraw"),
        ("POST", "/v1/pool/gc", {"json": {}}, "gc"),
        ("POST", "/v1/pool/verify", {"json": {}}, "verify"),
    ],
)
async def test_with_the_store_down_changes_are_503_and_reads_continue(
    method: str, path: str, sent: dict[str, Any], failing: str
) -> None:
    async with asked(store=FakeStore(failing={failing: (StoreUnavailable("connection refused"), 9)})) as (client, _):
        response = await client.request(method, path, **sent)
        assert (response.status_code, error_of(response)["code"]) == (503, "store_unavailable")
        assert "connection refused" not in error_of(response)["message"]  # the text is for the log
        assert response.headers["retry-after"] == "1"
        for read in ("/v1/loras", "/v1/loras/poet", "/v1/models", "/ready"):
            assert (await client.get(read)).status_code == 200


def test_a_batch_with_the_store_down_reports_it_for_each_adapter() -> None:
    store = FakeStore(failing={"stage": (StoreUnavailable("down"), 9)})
    response = post("/v1/loras", {"adapters": [{"path": "/a/one"}, {"path": "/a/two"}]}, store=store)
    assert response.status_code == 207
    rows = response.json()["data"]
    assert [(row["status"], row["error"]["code"]) for row in rows] == [(503, "store_unavailable")] * 2
