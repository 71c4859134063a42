from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import MAX_DOCTOR_PROMPTS
from deployments.publishing import maintenance
from lora_store import StoreUnavailable
from retriever_svc import AskedReport, DoctorReport, DoctorStep, EncoderUnusable
from retriever_svc.asked_prompts import AskedCounts
from retriever_svc.encoder import tokens_read
from retriever_svc.views import tokens_routed
from tests.deployments.adapter_records import POOL, digest_of
from tests.deployments.app_fakes import serve_plainly
from tests.deployments.asking import asked, error_of, lines_of, post
from tests.deployments.fake_retriever import FakeRetriever, reindex_step
from tests.deployments.key_files import bearer, entry, write

POET, CODER = (record.ref for record in POOL)
BODIES: dict[str, dict[str, Any]] = {"verify": {}, "doctor": {}, "reindex": {"encoder": "other"}, "gc": {}}


def test_verify_reports_progress_and_every_bad_blob() -> None:
    first, second, last = lines_of(post("/v1/pool/verify", {}))
    problem = {"digest": digest_of("b"), "adapter": str(CODER), "problem": "is missing"}
    assert (first, second) == ({"done": 1, "total": 2}, {"done": 2, "total": 2, "problem": problem})
    assert last == {"result": {"num_blobs": 2, "problems": [problem]}}


@pytest.mark.parametrize(("body", "retention_s"), [({}, 86_400), ({"retention_s": 0}, 0)])
async def test_gc_reports_the_removed_blobs(body: dict[str, Any], retention_s: float) -> None:
    async with asked() as (client, served):
        response = await client.post("/v1/pool/gc", json=body)
        assert (response.status_code, response.json()) == (200, {"num_blobs": 3, "num_bytes": 12, "num_projections": 1})
        assert served.store.called("gc") == [(retention_s,)]


@pytest.mark.parametrize(("has_keys", "state"), [(False, b""), (True, b"acme")])
async def test_an_export_is_of_the_keys_tenant(has_keys: bool, state: bytes, tmp_path: Path) -> None:
    keys = {"keys_file": write(tmp_path / "keys.json", entry("admin", roles=["admin"]))} if has_keys else {}
    async with asked(**keys) as (client, _):
        response = await client.get("/v1/pool/export", headers=bearer("admin"))
        assert (response.status_code, response.content) == (200, state)


async def test_a_file_of_an_export_is_streamed_in_parts_until_one_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.http.routes.maintenance.PART_BYTES", 3)
    async with asked() as (client, served):
        served.store.replicas[0].parts["blobs/aa/aab"] = {0: b"abc", 1: b"def", 2: b"g"}
        served.store.replicas[0].parts["blobs/aa/whole"] = {0: b"abc", 1: b""}
        for name, content in (("aab", b"abcdefg"), ("whole", b"abc")):
            response = await client.get(f"/v1/pool/files/blobs/aa/{name}")
            assert (response.status_code, response.content) == (200, content)
        assert (await client.get("/v1/pool/files/blobs/aa/gone")).status_code == 404


def test_the_doctor_reports_at_the_end() -> None:
    report = DoctorReport(7, 3, (), (), (POET,), ())
    steps = [DoctorStep(1, 2), DoctorStep(2, 2), DoctorStep(2, 2, report)]
    *progress, last = lines_of(post("/v1/pool/doctor", {}, retriever=FakeRetriever(steps=[steps])))
    assert progress == [{"done": 1, "total": 2}, {"done": 2, "total": 2}, {"done": 2, "total": 2}]
    assert (last["result"]["generation"], last["result"]["never_chosen"]) == (7, ["poet"])


def test_the_doctor_reports_who_answers_real_prompts() -> None:
    counts = AskedCounts(num=4, num_right=2, num_base=1)
    counts.others[CODER] = 1
    asked = AskedReport({POET: counts, None: AskedCounts(num=1, num_right=1)}, Counter({None: 3, POET: 1}))
    report = DoctorReport(7, 3, (), (), (), (), asked=asked)
    retriever = FakeRetriever(steps=[[DoctorStep(0, 9, report)]])
    prompts = [{"prompt": "a verse", "adapters": ["poet"]}, {"prompt": "hello", "adapters": []}, {"prompt": "and this"}]
    *_, last = lines_of(post("/v1/pool/doctor", {"prompts": prompts}, retriever=retriever))
    [given] = retriever.asked
    assert [(prompt.text, prompt.adapters) for prompt in given] == [
        ("a verse", ("poet",)),
        ("hello", ()),
        ("and this", None),
    ]
    found = last["result"]["prompts"]
    assert [found[key] for key in ("num", "num_right", "num_other", "num_base")] == [5, 3, 1, 1]
    assert [row["name"] for row in found["adapters"]] == [None, "poet"]
    assert found["adapters"][1]["others"] == [{"name": "coder", "num": 1}]
    assert found["unlabelled"] == [{"name": None, "num": 3}, {"name": "poet", "num": 1}]


@pytest.mark.parametrize(
    "prompt", [{}, {"prompt": ""}, {"prompt": "a", "adapter": "poet"}, {"prompt": "a", "adapters": [""]}]
)
def test_an_invalid_prompt_for_the_doctor_is_named(prompt: dict[str, Any]) -> None:
    response = post("/v1/pool/doctor", {"prompts": [prompt]}, retriever=FakeRetriever())
    assert (response.status_code, error_of(response)["param"].partition(".")[0]) == (400, "prompts")


def test_a_body_has_room_for_as_many_labelled_prompts_as_the_doctor_takes() -> None:
    prompts = [{"prompt": "a verse", "adapters": ["poet"]}] * MAX_DOCTOR_PROMPTS
    steps = [[DoctorStep(0, 0, DoctorReport(7, 3, (), (), (), ()))]]
    retriever = FakeRetriever(steps=steps)
    assert post("/v1/pool/doctor", {"prompts": prompts}, retriever=retriever).status_code == 200
    assert len(retriever.asked[0]) == MAX_DOCTOR_PROMPTS
    response = post("/v1/pool/doctor", {"prompts": [*prompts, prompts[0]]}, retriever=FakeRetriever())
    assert (response.status_code, error_of(response)["param"]) == (400, "prompts")


async def test_prompts_for_the_doctor_are_charged_to_the_key_by_their_views(tmp_path: Path) -> None:
    text = "\n\n".join(f"{word} " * 60 for word in ("tax", "river", "poem"))
    assert 2 * tokens_read(text) <= tokens_routed(text)
    steps = [[DoctorStep(0, 0, DoctorReport(7, 3, (), (), (), ()))] for _ in range(2)]
    keys = write(tmp_path / "keys.json", entry("all", limits={"tokens_per_minute": 8 * tokens_routed(text)}))
    async with asked(keys_file=keys, headers=bearer("all"), retriever=FakeRetriever(steps=steps)) as (client, _):
        body = {"prompts": [{"prompt": text}] * 8}
        statuses = [(await client.post("/v1/pool/doctor", json=body)).status_code for _ in range(2)]
        assert statuses == [200, 429]


@pytest.mark.parametrize(
    ("job", "error", "status"),
    [
        ("reindex", EncoderUnusable("other", "no such folder"), 400),
        ("reindex", StoreUnavailable("down"), 503),
        ("doctor", StoreUnavailable("down"), 503),
    ],
)
def test_an_error_before_the_first_line_is_a_status(job: str, error: Exception, status: int) -> None:
    response = post(f"/v1/pool/{job}", BODIES[job], retriever=FakeRetriever(steps=[[error]]))
    assert response.status_code == status
    assert error_of(response)["message"] == getattr(error, "client_message", str(error))


@pytest.mark.parametrize("job", ["reindex", "doctor"])
def test_an_error_after_the_first_line_is_the_last_line(job: str) -> None:
    first: Any = reindex_step(1, 2, POET) if job == "reindex" else DoctorStep(1, 2)
    retriever = FakeRetriever(steps=[[first, StoreUnavailable("down")]])
    opening, last = lines_of(post(f"/v1/pool/{job}", BODIES[job], retriever=retriever))
    assert opening == {"done": 1, "total": 2}
    assert last["error"]["code"] == "store_unavailable"


async def test_leaving_a_job_ends_the_work_of_its_replica() -> None:
    served = serve_plainly()
    lines = maintenance.verify(served.services.store, "local")
    await anext(lines)
    response = served.store.responses[-1]
    assert response.num_cancels == 0
    await lines.aclose()
    assert response.num_cancels == 1


@pytest.mark.parametrize("job", BODIES)
def test_a_job_needs_its_json_object(job: str) -> None:
    response = post(f"/v1/pool/{job}", {"surprise": 1} | BODIES[job])
    assert (response.status_code, error_of(response)["param"]) == (400, "surprise")
    assert post(f"/v1/pool/{job}", None).status_code == 400
