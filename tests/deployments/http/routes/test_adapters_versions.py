"""Approvals and reindexes by the role `admin`, over the routes.

Version shares and rollbacks over HTTP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from retriever_svc import Drawn, Draws, ReindexStep
from retriever_svc.draws import DrawnAdapter
from tests.deployments.adapter_records import POOL, adapter, pool_of
from tests.deployments.asking import asked, error_of, post, request
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.key_files import bearer, keys_of_all_roles

LIVE = POOL[0].ref.digest


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return keys_of_all_roles(tmp_path)


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("poet", {"digest": LIVE}, 200, None),
        ("poet", {}, 400, "invalid_request"),
        ("poet", {"digest": None}, 400, "invalid_request"),
        ("poet", {"digest": LIVE[:32]}, 400, "invalid_request"),
        ("poet", {"digest": LIVE.upper()}, 400, "invalid_request"),
        ("poet", {"digest": LIVE[:-1] + ("0" if LIVE[-1] != "0" else "1")}, 409, "version_changed"),
        (f"poet@{LIVE}", {"digest": LIVE}, 400, "invalid_request"),
        ("nobody", {"digest": LIVE}, 404, "model_not_found"),
    ],
)
async def test_an_admin_approves_the_full_digest_that_it_reviewed(
    keys: Path, name: str, body: Any, status: int, code: str | None
) -> None:
    async with asked(keys_file=keys, headers=bearer("all")) as (client, served):
        response = await client.post(f"/v1/loras/{name}/approve", json=body)
        assert (response.status_code, code and error_of(response)["code"]) == (status, code), response.text
        approved = [([POOL[0].ref], "id-all")] if status == 200 else []
        assert served.store.called("approve") == approved
    if code == "version_changed":
        error = error_of(response)
        assert error["param"] == "digest" and LIVE in error["message"], "so that it can be reviewed"


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 403),
        ({"public_requires_approval": False}, 403),
        ({"allow_self_approval": True}, 200),
    ],
)
async def test_an_admin_does_not_approve_for_its_own_tenant(keys: Path, settings: Any, status: int) -> None:
    record = adapter("poet", tenant="acme")
    settings = settings | {"keys_file": keys, "store": FakeStore(pool_of(record))}
    async with asked(headers=bearer("all"), **settings) as (client, served):
        served.retriever.replicas[0].held = (record,)
        response = await client.post("/v1/loras/acme/poet/approve", json={"digest": record.ref.digest})
        assert response.status_code == status, response.text
        assert served.store.called("approve") == ([([record.ref], "id-all")] if status == 200 else [])
        if status == 403:
            assert error_of(response)["code"] == "permission_denied"
            assert "allow_self_approval" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("key", "record", "status"),
    [
        ("all", adapter("poet", tenant="globex"), 200),
        ("publish", adapter("poet", tenant="globex"), 403),
        ("all", adapter("poet", tenant="acme"), 403),
        ("all", adapter("poet", tenant="acme", visibility="private"), 400),
    ],
)
@pytest.mark.parametrize("is_dry", [True, False])
async def test_an_approval_is_checked_and_a_dry_run_approves_nothing(
    keys: Path, key: str, record: Any, status: int, is_dry: bool
) -> None:
    async with asked(keys_file=keys, store=FakeStore(pool_of(record)), headers=bearer(key)) as (client, served):
        served.retriever.replicas[0].held = (record,)
        path = f"/v1/loras/{record.ref.tenant}/poet/approve?dry_run={is_dry}"
        response = await client.post(path, json={"digest": record.ref.digest})
        assert response.status_code == status, response.text
        is_approved = status == 200 and not is_dry
        assert response.json().get("approved") == (is_approved if status == 200 else None)
        assert served.store.called("approve") == ([([record.ref], f"id-{key}")] if is_approved else [])
        assert status != 400 or error_of(response)["param"] == "name", "a private adapter"


MANY = Draws(Drawn(535, 0, 0), (DrawnAdapter(POOL[1].ref, Drawn(16, 8, 12), Drawn(16, 4, 4), 0.75),))


@pytest.mark.parametrize(("body", "status"), [({}, 400), ({"confirmed": False}, 400), ({"confirmed": True}, 200)])
async def test_a_version_that_draws_many_prompts_of_others_has_to_be_confirmed(
    keys: Path, body: Any, status: int
) -> None:
    async with asked(keys_file=keys, headers=bearer("all")) as (client, served):
        served.retriever.replicas[0].drawn = MANY
        response = await client.post("/v1/loras/poet/approve", json={"digest": LIVE} | body)
        assert response.status_code == status, response.text
        assert served.store.called("approve") == ([([POOL[0].ref], "id-all")] if status == 200 else [])
        if status == 400:
            assert error_of(response)["param"] == "confirmed"
            expected = "50.0% (all adapters of local 75.0%) of the samples of local/coder"
            assert expected in error_of(response)["message"]


async def test_an_approver_is_shown_what_the_version_would_draw(keys: Path) -> None:
    async with asked(keys_file=keys, headers=bearer("all")) as (client, served):
        served.retriever.replicas[0].drawn = MANY
        response = await client.post("/v1/loras/poet/approve?dry_run=true", json={"digest": LIVE})
        draws = response.json()["draws"]
        samples, contents = {"share": 0.5, "owner_share": 0.75}, {"share": 0.25, "owner_share": 0.25}
        row = {"name": "local/coder", "samples": samples, "contents": contents, "similarity": 0.75}
        assert draws["adapters"] == [row]
        assert draws["text"].endswith(" It seems to be for the task of local/coder (0.75).")
        assert (draws["ordinary_prompts"], draws["needs_confirmation"]) == ({"share": 0.0, "owner_share": 0.0}, True)
        [(tenant, version, generation)] = served.retriever.called("draws")
        assert (tenant, version, generation) == ("acme", f"local/poet@{LIVE}", 7)


def test_without_keys_clients_that_may_change_the_pool_may_approve() -> None:
    response = post("/v1/loras/poet/approve", {"digest": LIVE})
    assert (response.status_code, response.json()["approved"]) == (200, True)


@pytest.mark.parametrize(
    ("encoder", "host", "is_allowed"),
    [
        ("org/listed", "192.0.2.7", True),
        ("multilingual-e5-small-tasks", "192.0.2.7", True),  # an encoder of the settings
        ("/srv/private", "192.0.2.7", False),
        ("org/any-model", "192.0.2.7", False),
        ("org/listed", "127.0.0.1", True),
        ("multilingual-e5-small-tasks", "127.0.0.1", True),
        ("/srv/private", "127.0.0.1", False),  # may be a port forward or a proxy on the machine
        ("org/any-model", "127.0.0.1", False),
    ],
)
async def test_an_admins_key_reindexes_with_a_listed_encoder_only(
    keys: Path, encoder: str, host: str, is_allowed: bool
) -> None:
    settings = {"retriever": FakeRetriever(steps=[[ReindexStep(1, 1, {}, ())]]), "encoders": ["org/listed"]}
    async with asked(keys_file=keys, host=host, headers=bearer("all"), **settings) as (client, served):
        response = await client.post("/v1/pool/reindex", json={"encoder": encoder})
        if is_allowed:
            assert response.status_code == 200, response.text
            assert served.retriever.called("reindex") == [(encoder, "auto")]
        else:
            assert (response.status_code, error_of(response)["code"]) == (403, "permission_denied")
            assert encoder not in response.text
            assert served.retriever.calls == served.store.calls == []


@pytest.mark.parametrize("digest", [None, adapter("poet", version="1").ref.digest[:12]])
def test_a_rollback_publishes_a_kept_version(digest: str | None) -> None:
    store = FakeStore(pool_of(adapter("poet", version="2"), adapter("poet", version="1")))
    response = post("/v1/loras/poet/rollback", {} if digest is None else {"digest": digest}, store=store)
    assert response.status_code == 201
    assert response.json()["digest"] == adapter("poet", version="1").ref.digest


def trial_of(client_answer: httpx.Response) -> Any:
    assert client_answer.status_code in (200, 201), client_answer.text
    return client_answer.json()["trial"]


async def test_a_share_goes_to_a_kept_version_and_ends_with_zero_or_one_roll_back() -> None:
    new, old = adapter("poet", version="2"), adapter("poet", version="1")
    store = FakeStore(pool_of(new, old))
    async with asked(store=store) as (client, _):

        async def share(**body: Any) -> Any:
            return trial_of(await client.post("/v1/loras/poet/share", json=body))

        trial = {"digest": old.ref.digest, "share": 0.1, "shadow": False}
        assert await share(share=0.1, digest=old.ref.digest[:8]) == trial
        assert await share(share=0.5, shadow=True) == trial | {"share": 0.5, "shadow": True}
        assert await share(share=0) is None
        await share(share=0.1, digest=old.ref.digest)
        rolled_back = await client.post("/v1/loras/poet/rollback", json={})
        assert (rolled_back.status_code, rolled_back.json()["digest"]) == (201, new.ref.digest)
        [live, *_] = store.live["local", "poet"]
        assert (live.ref, live.trial) == (new.ref, None)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"share": 0.1}, 404, "version_not_found"),
        ({"share": 0.1, "digest": "f" * 8}, 404, "version_not_found"),
        ({"share": 1.1, "digest": "f" * 8}, 400, "invalid_request"),
        ({"share": -0.1}, 400, "invalid_request"),
        ({"share": 0.1, "digest": "f"}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
    ],
)
def test_a_bad_share_is_refused(body: dict[str, Any], status: int, code: str) -> None:
    response = post("/v1/loras/poet/share", body)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_a_share_without_a_trial_says_which_versions_could_get_it() -> None:
    versions = [adapter("poet", version=str(number)) for number in (3, 2, 1)]
    error = error_of(post("/v1/loras/poet/share", {"share": 0.2}, store=FakeStore(pool_of(*versions))))
    second, first = (version.ref.digest[:12] for version in versions[1:])
    expected = f"digest: no version of 'poet' is under trial; name one of the kept versions: {second}, {first}"
    assert (error["message"], error["param"]) == (expected, "digest")
    alone = error_of(post("/v1/loras/poet/share", {"share": 0.2}))
    assert alone["message"].endswith("only the live one is kept; publish a new version with a share")


def test_a_version_is_published_for_a_share_and_the_live_one_stays() -> None:
    store = FakeStore(pool_of(*POOL))
    body = {"path": "/folders/poet", "name": "poet", "tags": ["new"], "share": 0.25}
    answer = post("/v1/loras", body, store=store).json()
    assert answer["trial"] == {"digest": answer["digest"], "share": 0.25, "shadow": False}
    assert [record.ref.digest for record in store.live["local", "poet"]] == [
        adapter("poet").ref.digest,
        answer["digest"],
    ]
    refused = post("/v1/loras", {"path": "/folders/poet", "shadow": True})
    assert (refused.status_code, "needs a `share`" in error_of(refused)["message"]) == (400, True)


@pytest.mark.parametrize(
    ("sent", "status", "param", "said"),
    [
        ({"json": {"digest": "f" * 8}}, 404, "digest", adapter("poet").ref.digest[:12]),
        ({"json": {"digest": "abc"}}, 400, "digest", ""),
        ({}, 400, None, "send a JSON object, such as {}"),
    ],
    ids=["not kept", "short", "no body"],
)
def test_a_rollback_that_names_no_kept_version_is_refused(
    sent: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    error = error_of(response := request("POST", "/v1/loras/poet/rollback", sent=sent))
    assert (response.status_code, error["param"]) == (status, param)
    assert error["code"] == ("version_not_found" if status == 404 else "invalid_request") and said in error["message"]


def patch(body: Any, **options: Any) -> httpx.Response:
    return request("PATCH", "/v1/loras/poet", sent={"json": body}, **options)


def test_an_edit_publishes_the_live_weights_with_other_tags_and_samples() -> None:
    old = adapter("poet", version="fun", template="alpaca")
    store = FakeStore(pool_of(old))
    answer = patch({"tags": ["new"], "samples": [{"input": "a", "output": "b"}], "digest": old.ref.digest}, store=store)
    assert answer.status_code == 201
    assert answer.json()["changed"] == {"tags": {"from": ["fun"], "to": ["new"]}, "samples": {"from": 2, "to": 1}}
    new, kept = store.live["local", "poet"]
    assert (new.ref.digest, new.tags, new.template) == (answer.json()["digest"], ("new",), "alpaca")
    assert (kept.ref, new.weights_digest) == (old.ref, old.weights_digest)


def test_an_edit_gives_and_takes_a_contract() -> None:
    store = FakeStore(pool_of(adapter("poet", version="fun")))
    contract = {"instruction": "Negate: {input}", "stop": ["."]}
    assert patch({"contract": contract}, store=store).json()["changed"] == {"contract": {"from": None, "to": contract}}
    [given, *_] = store.live["local", "poet"]
    assert json.loads(given.contract or "") == contract
    assert patch({"contract": {}}, store=store).status_code == 201
    assert store.live["local", "poet"][0].contract is None


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, None, "at least one of `visibility`, `tags`, `template`, `samples` and `contract`"),
        ({"digest": "a" * 64}, 400, None, "at least one of"),
        ({"tags": ["x"], "digest": "a" * 64}, 409, "digest", "is not the live version"),
        ({"tags": ["x"], "digest": "abc"}, 400, "digest", ""),
        ({"tags": ["auto"]}, 400, None, "tag 'auto' must be another"),
        ({"template": "mine"}, 400, "template", "alpaca"),
        ({"samples": [{"output": "b"}]}, 400, "samples.0.input", ""),
        ({"contract": {"instruction": "no place"}}, 400, "contract.instruction", "needs {input} once"),
        ({"contract": []}, 400, "contract", ""),
        ({"visibility": "private", "digest": "a" * 64}, 409, "digest", "is not the live version"),
    ],
)
def test_a_bad_edit_changes_nothing(body: dict[str, Any], status: int, param: str | None, message: str) -> None:
    store = FakeStore(pool_of(*POOL))
    response = patch(body, store=store)
    assert (response.status_code, error_of(response)["param"]) == (status, param), response.text
    assert message in error_of(response)["message"]
    assert store.live["local", "poet"] == (POOL[0],)
