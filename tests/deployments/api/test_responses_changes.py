from __future__ import annotations

from deployments.api.responses import Published, batch_object, published_object
from lora_store import AdapterRefused
from retriever_svc import Candidate
from tests.deployments.adapter_records import POOL

POET, CODER = POOL


def test_a_publish_reports_the_publishers_result() -> None:
    shown = published_object(Published(POET.ref, 8, 2, 1, True, 0.5, (Candidate(CODER.ref, 0.25),)))
    assert shown == {
        "name": "poet",
        "digest": POET.ref.digest,
        "generation": 8,
        "replicas": {"ready": 2, "behind": 1},
        "found_by_auto": True,
        "probe_shift": 0.5,
        "neighbours": [{"name": "coder", "digest": CODER.ref.digest, "score": 0.25}],
    }


def test_a_batch_reports_each_adapter_as_if_published_alone() -> None:
    published = Published(POET.ref, 8, 2, 0, True, 0.5, ())
    late = Published(CODER.ref, 8, 1, 1, True, 0.5, ())
    first, second, third = batch_object([published, AdapterRefused("x", ["it is bad"]), late])["data"]
    assert first == {"status": 201, **published_object(published)}
    assert (second["status"], second["error"]["code"]) == (400, "adapter_refused")
    assert third["status"] == 202
