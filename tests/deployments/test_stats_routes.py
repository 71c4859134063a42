from __future__ import annotations

from tests.deployments.adapter_records import BASE
from tests.deployments.asking import get
from tests.deployments.console_fakes import CountingWorker, MappedRetriever


def test_the_figures_are_had_over_http() -> None:
    response = get("/v1/stats", worker=CountingWorker(), retriever=MappedRetriever())
    stats = response.json()
    assert response.status_code == 200
    assert (stats["object"], stats["base_model"]) == ("stats", BASE)
    assert stats["defaults"] == {"strategy": "mixture", "k": 3}
    assert stats["workers"]["num_running"] == 3
    assert stats["pool"]["generation"] == 7


def test_no_adapter_is_named() -> None:
    text = get("/v1/stats", worker=CountingWorker(), retriever=MappedRetriever()).text
    assert "poet" not in text and "resident" not in text
