"""The probes over HTTP, during the start and afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from deployments.api.adapters import PublishItem
from deployments.calls.catalogue_clients import Shapes
from lora_store import Staged
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.asking import ask, error_of, get
from tests.deployments.fake_store import FakeStore
from tests.deployments.preloads import preload_of


class SlowStore(FakeStore):
    """Stages nothing until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged:
        await self.gate.wait()
        return await super().stage(upload, shapes_by_model)


def test_health_answers_while_ready_waits_for_the_preload(tmp_path: Path) -> None:
    async def run() -> None:
        store = SlowStore()
        served = serve_plainly(store=store, preload=preload_of(tmp_path, "poet"))
        async with http_of(served) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            waiting = await client.get("/ready")
            assert (waiting.status_code, error_of(waiting)["code"]) == (503, "not_ready")
            store.gate.set()
            await served.services.preload.wait()
            assert (await client.get("/ready")).status_code == 200

    asyncio.run(run())


def test_ready_reports_refused_preloaded_adapters(tmp_path: Path) -> None:
    response = get("/ready", preload=preload_of(tmp_path, "poet", "bad"))
    assert response.status_code == 200
    ready = response.json()
    assert (ready["status"], ready["generation"], ready["num_adapters"]) == ("ready", 7, 2)
    assert ready["refused"] == {"bad": "adapter 'bad' refused: it is bad"}
    assert str(tmp_path) not in response.text


def test_the_operator_sees_the_paths_of_refused_folders(tmp_path: Path) -> None:
    async def started(_: httpx.AsyncClient, served: Served) -> Any:
        return await served.ingress.started()

    found = ask(started, preload=preload_of(tmp_path, "poet", "bad"))
    assert found["refused"] == {str(tmp_path / "bad"): "adapter 'bad' refused: it is bad"}
