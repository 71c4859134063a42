"""The adapters that a server publishes at its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import PublishItem
from deployments.errors import NoAnswerInTime, NotReady
from deployments.publishing.preload import Preload
from lora_store import AdapterRecord, AdapterRefused, Key, StoreUnavailable, VersionConflict
from tests.deployments.adapter_records import BASE, adapter, key_of, pool_of
from tests.deployments.app_fakes import Served, serve_plainly
from tests.deployments.asking import asked
from tests.deployments.fake_store import FakeStore
from tests.deployments.key_files import entry, write
from tests.deployments.preloads import preload_of


@pytest.mark.parametrize(
    ("method", "error", "statuses"),
    [
        ("commit", VersionConflict(3), [503, 200]),
        ("stage", StoreUnavailable("a timeout"), [503, 200]),
        ("stage", NotReady("no worker of the base model 'code' has answered yet"), [200, 200]),
        ("stage", AdapterRefused("poet", ["it is bad"]), [200, 200]),
    ],
    ids=["all failed", "one failed", "one base model is away", "one is refused"],
)
async def test_calls_of_ready_repeat_a_preload_until_nothing_failed_that_may_pass(
    tmp_path: Path, method: str, error: Exception, statuses: list[int]
) -> None:
    store = FakeStore(failing={method: (error, 1)})
    async with asked(store=store, preload=preload_of(tmp_path, "poet", "sql")) as (client, served):
        answers = []
        for _ in statuses:
            answers.append(await client.get("/ready"))
            await served.services.preload.wait()
    assert [answer.status_code for answer in answers] == statuses
    is_final = isinstance(error, AdapterRefused)
    assert {name for _, name in store.live} == ({"sql"} if is_final else {"poet", "sql"})
    assert list(answers[-1].json()["refused"]) == (["poet"] if is_final else [])


async def test_a_repeated_preload_leaves_adapters_withdrawn_that_it_had_published(tmp_path: Path) -> None:
    store = FakeStore(failing={"stage": (NotReady("no worker"), 1)})
    async with asked(store=store, preload=preload_of(tmp_path, "poet", "sql")) as (client, served):
        assert (await client.delete("/v1/loras/sql")).status_code == 200
        await client.get("/ready")
        await served.services.preload.wait()
    assert list(store.live) == [("local", "poet")]


async def test_the_preload_waits_for_a_worker_that_loads_its_model_for_minutes(tmp_path: Path) -> None:
    class Starting:
        num_calls = 0

        async def live(self, batch: Sequence[PublishItem]) -> dict[Key, AdapterRecord]:
            return {}

        async def publish(self, batch: Sequence[PublishItem], actor: str) -> list[Exception]:
            self.num_calls += 1
            if self.num_calls < 4:
                raise NoAnswerInTime
            return [AdapterRefused(batch[0].adapter_name, ["it is bad"])]

    preload = Preload(preload_of(tmp_path, "poet"), Starting())  # type: ignore[arg-type]
    await preload.wait()
    assert [Path(path).name for path in preload.refused()] == ["poet"]


async def test_the_preload_is_published_in_batches_of_one_commit_each(tmp_path: Path) -> None:
    served = await started(preload=preload_of(tmp_path, *[f"a{number:02}" for number in range(33)]))
    commits = served.store.called("commit")
    assert [len(staged) for staged, *_ in commits] == [32, 1]
    assert {actor for _, _, _, actor, *_ in commits} == {"preload"}


@pytest.mark.parametrize(("base_model", "is_published"), [(BASE, False), ("org/old", True)])
async def test_a_live_version_is_replaced_only_if_it_was_made_for_another_base(
    tmp_path: Path, base_model: str, is_published: bool
) -> None:
    store = FakeStore(pool_of(replace(adapter("poet", version="old"), base_model=base_model, tags=())))
    served = await started(store=store, preload=preload_of(tmp_path, "poet"))
    assert bool(served.store.called("commit")) == is_published


@pytest.mark.parametrize(
    ("settings", "is_approved"),
    [
        ({}, False),
        ({"public_requires_approval": True}, True),
        ({"keys_file": "keys.json"}, True),
        ({"keys_file": "keys.json", "public_requires_approval": False}, True),
    ],
    ids=["no keys", "asked for", "keys", "keys, not asked for"],
)
async def test_new_and_earlier_preloaded_adapters_are_approved_if_there_are_other_tenants(
    tmp_path: Path, settings: dict[str, Any], is_approved: bool
) -> None:
    if "keys_file" in settings:
        settings = settings | {"keys_file": write(tmp_path / "keys.json", entry("k"))}
    folders, store = preload_of(tmp_path, "a", "b", "c", "d"), FakeStore()
    for name, actor in (("a", "preload"), ("b", "id-acme"), ("c", "preload")):
        record = replace(adapter(name, tenant="local"), actor=actor, approved=name == "c")
        store.live[key_of(record)] = (record,)
    served = await started(store=store, preload=folders, **settings)
    approved = [(ref.name, actor) for refs, actor in served.store.called("approve") for ref in refs]
    assert sorted(approved) == ([("a", "preload"), ("d", "preload")] if is_approved else [])


async def started(**settings: Any) -> Served:
    """Return an application after its preload."""
    served = serve_plainly(**settings)
    await served.services.preload.wait()
    return served
