from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.auth.authenticator import ROLES
from deployments.calls.worker_client import Usage
from tests.deployments.adapter_records import BASE
from tests.deployments.asking import get
from tests.deployments.console_fakes import CountingWorker, MappedRetriever
from tests.deployments.key_files import bearer, entry, write


def test_stats_are_available_over_http() -> None:
    response = get("/v1/stats", worker=CountingWorker(), retriever=MappedRetriever())
    stats = response.json()
    assert response.status_code == 200
    assert (stats["object"], stats["base_model"]) == ("stats", BASE)
    assert stats["defaults"] == {"strategy": "mixture", "k": 3, "learning": "off"}
    assert stats["workers"]["num_running"] == 3
    assert stats["pool"]["generation"] == 7


def test_no_adapter_is_named() -> None:
    text = get("/v1/stats", worker=CountingWorker(), retriever=MappedRetriever()).text
    assert "poet" not in text and "resident" not in text


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
