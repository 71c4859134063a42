from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments.adapter_records import POOL, pool_of
from tests.deployments.asking import asked, error_of
from tests.deployments.fake_store import FakeStore
from tests.deployments.key_files import bearer, entry, write
from tests.virtual_time import in_virtual_time

CHAT = {"messages": [{"role": "user", "content": "Rhyme on rain."}]}
DIGEST = POOL[0].ref.digest


async def judged(learning: str, *scores: float, **changes: Any) -> tuple[FakeStore, list[httpx.Response]]:
    """Ask once, send these scores with other fields, and return the store and the answers."""
    store = FakeStore(pool_of(*POOL))
    async with asked(store=store, learning=learning) as (client, served):
        request_id = (await client.post("/v1/chat/completions", json=CHAT)).headers["x-request-id"]
        await served.services.background.idle()
        body = {"request_id": request_id, "adapter": "poet"}
        return store, [await client.post("/v1/outcomes", json=body | {"score": score} | changes) for score in scores]


async def test_an_observed_outcome_is_kept_and_changes_nothing() -> None:
    store, [answer] = await judged("observe", -0.5)
    assert (answer.status_code, answer.json()["applies"]) == (201, False)
    [outcome] = [given for (_, kind, _), given in store.given.items() if kind == "outcome"]
    assert (outcome.text, outcome.adapter, outcome.score) == ("Rhyme on rain.", "local/poet", -0.5)
    assert (store.generation, store.ranked) == (7, [])


@pytest.mark.parametrize("name", ["local/poet", f"poet@{DIGEST[:8]}", f"poet@{DIGEST[:9]}", f"local/poet@{DIGEST}"])
async def test_an_outcome_is_kept_under_one_name_of_its_adapter(name: str) -> None:
    """So a key has no more outcomes for an adapter by writing its name in other ways."""
    store, [answer] = await judged("observe", 1, adapter=name)
    assert (answer.status_code, answer.json()["adapter"]) == (201, name)
    assert [given.adapter for (_, kind, _), given in store.given.items() if kind == "outcome"] == ["local/poet"]


@pytest.mark.parametrize("adapter", ["poet", None])
@in_virtual_time
async def test_applied_outcomes_become_the_tenants_own_choices_in_one_commit(adapter: str | None) -> None:
    store, answers = await judged("apply", 1, -1, adapter=adapter)
    assert [answer.json()["applies"] for answer in answers] == [True, True]
    [(tenant, rankings)] = store.ranked
    assert tenant == "local"
    assert [ranking.is_outcome for ranking in rankings] == [True], "the later one replaces the earlier one"
    assert store.generation == 8


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"request_id": "unknown"}, 404, "request_not_kept"),
        ({"adapter": "nobody"}, 404, "model_not_found"),
        ({"score": 1.5}, 400, "invalid_request"),
        ({"score": "good"}, 400, "invalid_request"),
    ],
)
async def test_an_outcome_of_nothing_known_is_refused(changes: dict[str, Any], status: int, code: str) -> None:
    store, [response] = await judged("observe", 1, **changes)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert not [kind for _, kind, _ in store.given if kind == "outcome"]


async def test_without_learning_no_request_is_kept() -> None:
    _, [answer] = await judged("off", 1)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "request_not_kept")
    assert "learning: observe or apply" in error_of(answer)["message"]


async def test_a_tenant_cannot_judge_another_tenants_request(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("acme", "acme"), entry("globex", "globex"))
    async with asked(learning="observe", keys_file=keys) as (client, served):
        chat = await client.post("/v1/chat/completions", json=CHAT, headers=bearer("acme"))
        await served.services.background.idle()
        body = {"request_id": chat.headers["x-request-id"], "adapter": None, "score": 1}
        own = await client.post("/v1/outcomes", json=body, headers=bearer("acme"))
        assert own.status_code == 201, own.text
        response = await client.post("/v1/outcomes", json=body, headers=bearer("globex"))
    assert (response.status_code, error_of(response)["code"]) == (404, "request_not_kept")
