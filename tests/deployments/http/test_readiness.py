"""The calls of `/ready` to Retriever and Worker: how often, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.api.pool_responses import Ready
from deployments.background import Background
from deployments.calls.catalogue_clients import serve_retriever
from deployments.calls.worker_client import serve_worker
from deployments.errors import NotReady
from deployments.http.readiness import KEPT_S, MAX_WAITING, Readiness
from deployments.publishing.preload import Preload
from lora_store import AdapterRecord
from retriever_svc import BaseCounts
from tests.clocks import Clock
from tests.deployments.adapter_records import POOL, adapter
from tests.deployments.fake_publishing import Publishing, workers_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import FakeWorker
from tests.deployments.preloads import preload_of
from tests.fakes import FakeHandle


class Silent(FakeWorker):
    """Never answers."""

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        await asyncio.Event().wait()
        raise AssertionError


class Dead(FakeWorker):
    """Its replicas keep dying."""

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        raise RayActorError()


@dataclass(frozen=True)
class Asked:
    """A Readiness over fakes."""

    readiness: Readiness
    worker: FakeHandle
    retriever: FakeHandle


@asynccontextmanager
async def ready_parts(
    *,
    worker: FakeWorker | None = None,
    held: tuple[AdapterRecord, ...] = POOL,
    unserved: BaseCounts = (),
    folders: tuple[Path, ...] = (),
    has_keys: bool = False,
    **options: Any,
) -> AsyncIterator[Asked]:
    """Yield the parts after the preload."""
    asked = Publishing(retriever=FakeHandle(FakeRetriever(held, unserved=unserved)))
    handle, background = FakeHandle(worker or FakeWorker()), Background()
    client = serve_worker(handle)
    preload = Preload(folders, asked.publisher(background))
    await preload.wait()
    readiness = Readiness(preload, workers_of(client), serve_retriever(asked.retriever), has_keys=has_keys, **options)
    yield Asked(readiness, handle, asked.retriever)
    await background.idle()


async def shown(**options: Any) -> Ready:
    async with ready_parts(**options) as asked:
        return await asked.readiness.public()


async def test_without_keys_the_local_tenants_private_adapters_count_too() -> None:
    of_acme = adapter("secret", tenant="acme", visibility="private")
    assert await shown(held=(adapter("poet"), adapter("mine", visibility="private"), of_acme)) == {
        "status": "ready",
        "generation": 7,
        "num_adapters": 2,
        "unserved": [],
        "refused": {},
    }


async def test_with_keys_only_the_status_is_returned_and_private_adapters_do_not_count() -> None:
    held = (adapter("poet"), adapter("secret", tenant="acme", visibility="private"))
    assert await shown(held=held, has_keys=True) == {"status": "ready"}
    async with ready_parts(held=held, has_keys=True) as asked:
        assert (await asked.readiness.details())["num_adapters"] == 1


@pytest.mark.parametrize("has_keys", [False, True])
async def test_the_operator_sees_how_many_adapters_of_other_bases_are_not_served(has_keys: bool) -> None:
    async with ready_parts(unserved=(("org/old", 12),), has_keys=has_keys) as asked:
        answer, details = await asked.readiness.public(), await asked.readiness.details()
    assert [(row["base_model"], row["num_adapters"]) for row in details["unserved"]] == [("org/old", 12)]
    assert ("unserved" in answer) == (not has_keys)


async def test_the_wait_for_a_worker_is_limited() -> None:
    with pytest.raises(NotReady, match=r"did not answer within 0\.01 s"):
        await shown(worker=Silent(), wait_s=0.01)


async def test_an_error_reaches_every_waiting_client_and_the_next_one_calls_again() -> None:
    clock = Clock()
    async with ready_parts(worker=Dead(), clock=clock) as asked:
        outcomes = []
        for _ in range(2):
            both = await asyncio.gather(*[asked.readiness.public() for _ in range(2)], return_exceptions=True)
            outcomes += [type(outcome).__name__ for outcome in both]
            clock.at += KEPT_S
        assert len(asked.worker.called("module_shapes")) >= 2
    assert len(outcomes) == 4 and "dict" not in outcomes


async def test_both_are_called_once_per_half_second_for_any_number_of_clients() -> None:
    clock = Clock()
    async with ready_parts(clock=clock) as asked:
        for step_s, num_asked in ((0.0, 1), (0.4, 1), (0.2, 2)):
            clock.at += step_s
            answers = await asyncio.gather(*[asked.readiness.public() for _ in range(20)])
            assert {answer["status"] for answer in answers} == {"ready"}
            assert len(asked.retriever.called("load")) == len(asked.worker.called("module_shapes")) == num_asked


async def test_the_number_of_waiting_clients_is_limited_and_leaving_ones_make_room() -> None:
    async with ready_parts(worker=Silent()) as asked:
        waiting = [asyncio.create_task(asked.readiness.public()) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(NotReady, match="256 clients"):
            await asked.readiness.public()
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        again = asyncio.create_task(asked.readiness.public())
        await asyncio.sleep(0)
        assert not again.done(), "it waits as the others did"
        again.cancel()


async def test_refused_folders_of_one_name_are_both_shown_to_clients_without_their_paths(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        preload_of(tmp_path / name, "poet", "bad")
    folders = (tmp_path / "one", tmp_path / "two")
    assert (await shown(folders=folders))["refused"] == {"bad": "; ".join(["adapter 'bad' refused: it is bad"] * 2)}
