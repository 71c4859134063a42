"""Load, usage and probes over HTTP, during the start and afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from deployments.api.adapters import PublishItem
from deployments.auth.authenticator import ROLES
from deployments.calls.catalogue_clients import Shapes
from deployments.calls.worker_client import Usage
from lora_store import Staged
from tests.deployments.adapter_records import BASE
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import asked, error_of, get
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.key_files import bearer, entry, write
from tests.deployments.preloads import preload_of


def test_stats_are_available_over_http_and_name_no_adapter() -> None:
    response = get("/v1/stats", worker=CountingWorker(), retriever=MappedRetriever())
    stats = response.json()
    assert response.status_code == 200
    assert (stats["object"], stats["base_model"]) == ("stats", BASE)
    assert stats["defaults"] == {"strategy": "mixture", "k": 3, "learning": "off"}
    assert stats["workers"]["num_running"] == 3
    assert stats["pool"]["generation"] == 7
    assert "poet" not in response.text and "resident" not in response.text


USAGES = {"acme": Usage(1, 2, 30, 40), "globex": Usage(5, 6, 70, 80)}


@pytest.mark.parametrize("role", ROLES)
def test_with_keys_only_an_admin_sees_the_load_of_all_workers(tmp_path: Path, role: str) -> None:
    keys = write(tmp_path / "keys.json", entry("k", "acme", [role]))
    worker = CountingWorker(usages=USAGES)
    response = get("/v1/stats", worker=worker, retriever=MappedRetriever(), keys_file=keys, headers=bearer("k"))
    stats = response.json()
    assert response.status_code == 200
    assert stats["tenant"] == {"num_running": 1, "requests": 2, "prompt_tokens": 30, "new_tokens": 40}
    assert (stats["workers"] is not None) is (role == "admin")
    if role != "admin":
        assert "globex" not in response.text and "80" not in json.dumps(stats["tenant"])


def test_a_tenant_without_requests_has_no_usage(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k", "new", ["infer"]))
    worker = CountingWorker(usages=USAGES)
    stats = get("/v1/stats", worker=worker, keys_file=keys, headers=bearer("k")).json()
    assert set(stats["tenant"].values()) == {0}


class SlowStore(FakeStore):
    """Stages nothing until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged:
        await self.gate.wait()
        return await super().stage(upload, shapes_by_model)


async def test_health_answers_while_ready_waits_for_the_preload(tmp_path: Path) -> None:
    store = SlowStore()
    served = serve_plainly(store=store, preload=preload_of(tmp_path, "poet"))
    async with http_of(served) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        waiting = await client.get("/ready")
        assert (waiting.status_code, error_of(waiting)["code"]) == (503, "not_ready")
        assert [(await client.head(path)).status_code for path in ("/health", "/ready")] == [200, 503]
        store.gate.set()
        await served.services.preload.wait()
        assert (await client.get("/ready")).status_code == (await client.head("/ready")).status_code == 200


async def test_the_operator_sees_the_paths_of_refused_folders(tmp_path: Path) -> None:
    async with asked(preload=preload_of(tmp_path, "poet", "bad")) as (_, served):
        found = await served.ingress.started()
    assert found["refused"] == {str(tmp_path / "bad"): "adapter 'bad' refused: it is bad"}
