"""Approvals and reindexes by the role `admin`, over the routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from retriever_svc import Drawn, DrawnAdapter, Draws, ReindexStep
from tests.deployments.adapter_records import POOL, adapter, pool_of
from tests.deployments.app_fakes import Served
from tests.deployments.asking import ask, error_of, post
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
def test_an_admin_approves_the_full_digest_that_it_reviewed(
    keys: Path, name: str, body: Any, status: int, code: str | None
) -> None:
    async def look(client: httpx.AsyncClient, served: Served) -> None:
        response = await client.post(f"/v1/loras/{name}/approve", json=body)
        assert (response.status_code, code and error_of(response)["code"]) == (status, code), response.text
        approved = [([POOL[0].ref], "id-all")] if status == 200 else []
        assert served.store.called("approve") == approved

    ask(look, keys_file=keys, headers=bearer("all"))


def test_an_update_after_the_review_is_not_approved(keys: Path) -> None:
    """The error names the version that is live now, so that it can be reviewed."""
    changed = adapter("poet", version="changed")

    async def look(client: httpx.AsyncClient, served: Served) -> None:
        seen = (await client.get("/v1/loras/poet")).json()["digest"]
        served.retriever.replicas[0].held = (changed,)
        response = await client.post("/v1/loras/poet/approve", json={"digest": seen})
        assert (response.status_code, error_of(response)["param"]) == (409, "digest")
        assert changed.ref.digest in error_of(response)["message"]
        assert served.store.called("approve") == []

    ask(look, keys_file=keys, headers=bearer("all"))


def test_a_private_adapter_is_not_approved(keys: Path) -> None:
    mine = adapter("mine", tenant="acme", visibility="private")

    async def look(client: httpx.AsyncClient, served: Served) -> None:
        served.retriever.replicas[0].held = (mine,)
        response = await client.post("/v1/loras/mine/approve", json={"digest": mine.ref.digest})
        assert (response.status_code, error_of(response)["param"]) == (400, "name")

    ask(look, keys_file=keys, headers=bearer("all"))


@pytest.mark.parametrize(
    ("owner", "settings", "status"),
    [
        ("acme", {}, 403),
        ("acme", {"public_requires_approval": False}, 403),
        ("acme", {"allow_self_approval": True}, 200),
        ("globex", {}, 200),
    ],
)
def test_an_admin_does_not_approve_for_its_own_tenant(keys: Path, owner: str, settings: Any, status: int) -> None:
    record = adapter("poet", tenant=owner)

    async def look(client: httpx.AsyncClient, served: Served) -> None:
        served.retriever.replicas[0].held = (record,)
        response = await client.post(f"/v1/loras/{owner}/poet/approve", json={"digest": record.ref.digest})
        assert response.status_code == status, response.text
        assert served.store.called("approve") == ([([record.ref], "id-all")] if status == 200 else [])
        if status == 403:
            assert error_of(response)["code"] == "permission_denied"
            assert "allow_self_approval" in error_of(response)["message"]

    ask(look, keys_file=keys, headers=bearer("all"), store=FakeStore(pool_of(record)), **settings)


@pytest.mark.parametrize(
    ("key", "record", "status"),
    [
        ("all", adapter("poet", tenant="globex"), 200),
        ("publish", adapter("poet", tenant="globex"), 403),
        ("all", adapter("poet", tenant="acme"), 403),
        ("all", adapter("poet", tenant="acme", visibility="private"), 400),
    ],
)
def test_a_dry_run_checks_an_approval_and_approves_nothing(keys: Path, key: str, record: Any, status: int) -> None:
    async def look(client: httpx.AsyncClient, served: Served) -> None:
        served.retriever.replicas[0].held = (record,)
        path = f"/v1/loras/{record.ref.tenant}/poet/approve?dry_run=true"
        response = await client.post(path, json={"digest": record.ref.digest})
        assert response.status_code == status, response.text
        assert response.json().get("approved") in (False, None)
        assert served.store.called("approve") == []

    ask(look, keys_file=keys, headers=bearer(key))


MANY = Draws(Drawn(535, 0, 0), (DrawnAdapter(POOL[1].ref, Drawn(16, 8, 12), Drawn(16, 4, 4)),))


@pytest.mark.parametrize(("body", "status"), [({}, 400), ({"confirmed": False}, 400), ({"confirmed": True}, 200)])
def test_a_version_that_draws_many_prompts_of_others_has_to_be_confirmed(keys: Path, body: Any, status: int) -> None:
    async def look(client: httpx.AsyncClient, served: Served) -> None:
        served.retriever._replicas[0].drawn = MANY
        response = await client.post("/v1/loras/poet/approve", json={"digest": LIVE} | body)
        assert response.status_code == status, response.text
        assert served.store.called("approve") == ([([POOL[0].ref], "id-all")] if status == 200 else [])
        if status == 400:
            assert error_of(response)["param"] == "confirmed"
            expected = "50.0% (all adapters of local 75.0%) of the samples of local/coder"
            assert expected in error_of(response)["message"]

    ask(look, keys_file=keys, headers=bearer("all"))


def test_an_approver_is_shown_what_the_version_would_draw(keys: Path) -> None:
    async def look(client: httpx.AsyncClient, served: Served) -> None:
        served.retriever._replicas[0].drawn = MANY
        response = await client.post("/v1/loras/poet/approve?dry_run=true", json={"digest": LIVE})
        draws = response.json()["draws"]
        samples, contents = {"share": 0.5, "owner_share": 0.75}, {"share": 0.25, "owner_share": 0.25}
        assert draws["adapters"] == [{"name": "local/coder", "samples": samples, "contents": contents}]
        assert (draws["ordinary_prompts"], draws["needs_confirmation"]) == ({"share": 0.0, "owner_share": 0.0}, True)
        [(tenant, version, generation)] = served.retriever.called("draws")
        assert (tenant, version, generation) == ("acme", f"local/poet@{LIVE}", 7)

    ask(look, keys_file=keys, headers=bearer("all"))


def test_without_keys_clients_that_may_change_the_pool_may_approve() -> None:
    response = post("/v1/loras/poet/approve", {"digest": LIVE})
    assert (response.status_code, response.json()["approved"]) == (200, True)


@pytest.mark.parametrize(
    ("encoder", "host", "is_allowed"),
    [
        ("org/listed", "192.0.2.7", True),
        ("multilingual-e5-small", "192.0.2.7", True),  # an encoder of the settings
        ("/srv/private", "192.0.2.7", False),
        ("org/any-model", "192.0.2.7", False),
        ("org/listed", "127.0.0.1", True),
        ("multilingual-e5-small", "127.0.0.1", True),
        ("/srv/private", "127.0.0.1", False),  # may be a port forward or a proxy on the machine
        ("org/any-model", "127.0.0.1", False),
    ],
)
def test_an_admins_key_reindexes_with_a_listed_encoder_only(
    keys: Path, encoder: str, host: str, is_allowed: bool
) -> None:
    async def look(client: httpx.AsyncClient, served: Served) -> None:
        response = await client.post("/v1/pool/reindex", json={"encoder": encoder})
        if is_allowed:
            assert response.status_code == 200, response.text
            assert served.retriever.called("reindex") == [(encoder, "auto")]
        else:
            assert (response.status_code, error_of(response)["code"]) == (403, "permission_denied")
            assert encoder not in response.text
            assert served.retriever.calls == served.store.calls == []

    retriever = FakeRetriever(steps=[[ReindexStep(1, 1, {}, ())]])
    ask(look, keys_file=keys, encoders=["org/listed"], host=host, headers=bearer("all"), retriever=retriever)
