"""All uploads in progress share one budget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest
from fastapi import Request
from starlette.types import Message

from deployments.api.adapters import PublishItem, SentFile
from deployments.byte_budget import ByteBudget
from deployments.calls.catalogue_clients import Shapes
from deployments.config.app import FORM_OVERHEAD_BYTES, OTHER_FILES_BYTES
from deployments.errors import BodyTooSlow, UploadMemoryFull
from deployments.http.uploads import count_upload
from lora_store import Staged, StoreUnavailable
from tests.deployments.adapter_records import POOL, pool_of
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.asking import error_of
from tests.deployments.fake_store import FakeStore
from tests.virtual_time import run_in_virtual_time

ONE = FORM_OVERHEAD_BYTES + 100
LARGEST = FORM_OVERHEAD_BYTES + OTHER_FILES_BYTES + 1  # an upload with weights of one byte


def request_of(*parts: bytes, announced: int | str | None = None) -> Request:
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    headers = [] if announced is None else [(b"content-length", str(announced).encode("latin-1", "replace"))]

    async def receive() -> Message:
        return messages.pop(0)

    return Request({"type": "http", "headers": headers}, receive)


async def read(budget: ByteBudget, http: Request, count: int) -> int:
    """Return the budget's use after this many pieces of the request were read."""
    with count_upload(http, "a", budget) as body:
        for _ in range(count):
            await body.receive()
        return budget.num_bytes


async def test_an_announced_length_counts_at_once_and_until_the_end() -> None:
    budget = ByteBudget(10)
    assert await read(budget, request_of(announced=10), 0) == 10
    assert budget.num_bytes == 0
    with pytest.raises(UploadMemoryFull, match="10 bytes"):
        await read(budget, request_of(announced=11), 0)
    assert budget.num_bytes == 0


async def test_an_unannounced_body_counts_as_it_arrives() -> None:
    budget = ByteBudget(10)
    assert await read(budget, request_of(b"1234", b"567", b"890"), 2) == 7
    with pytest.raises(UploadMemoryFull):
        await read(budget, request_of(b"123456", b"78901"), 2)
    assert budget.num_bytes == 0


async def test_bytes_beyond_the_announced_length_count_too() -> None:
    budget = ByteBudget(10)
    assert await read(budget, request_of(b"1234", b"5678", announced=5), 1) == 5
    assert await read(budget, request_of(b"1234", b"5678", announced=5), 2) == 8


@pytest.mark.parametrize("announced", ["-5", "five", "²", "9" * 400])
def test_an_invalid_length_announces_nothing(announced: str) -> None:
    with count_upload(request_of(announced=announced), "a", ByteBudget(10)):
        pass


def test_uploads_of_one_tenant_leave_room_for_another() -> None:
    budget = ByteBudget(1000, always_bytes=500, has_tenants=True)
    with count_upload(request_of(announced=500), "a", budget):
        with pytest.raises(UploadMemoryFull), count_upload(request_of(announced=400), "a", budget):
            pass
        with count_upload(request_of(announced=500), "b", budget):
            assert budget.num_bytes == 1000
    assert budget.num_bytes == 0


@pytest.mark.parametrize("sent", [0, 1, (640 << 10) - 1])
def test_an_upload_below_the_minimum_rate_is_refused_and_frees_its_budget(sent: int) -> None:
    messages = [{"type": "http.request", "body": b"x" * sent, "more_body": True}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def run() -> None:
        budget = ByteBudget(1 << 20)
        http = Request({"type": "http", "headers": [(b"content-length", b"1000000")]}, receive)
        with pytest.raises(BodyTooSlow, match="640 KiB in 10 s"), count_upload(http, "a", budget) as body:
            while True:
                await body.receive()
        assert budget.num_bytes == 0

    run_in_virtual_time(run())


def test_an_upload_that_keeps_its_rate_may_take_longer_than_one_window() -> None:
    async def receive() -> Message:
        await asyncio.sleep(9)
        return {"type": "http.request", "body": b"x" * (640 << 10), "more_body": True}

    async def run() -> None:
        with count_upload(Request({"type": "http", "headers": []}, receive), "a", ByteBudget(10 << 20)) as http:
            for _ in range(4):
                assert (await http.receive())["more_body"]

    run_in_virtual_time(run())


@pytest.mark.parametrize("charset", ["punycode", "undefined", "'", '"utf-16"', "utf-8; charset=idna", ""])
async def test_a_charset_other_than_utf8_is_refused_before_anything_is_read(charset: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary=b; Charset={charset}"}

    async def never_read() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    async with http_of(serve_plainly()) as client:
        refused = await client.post("/v1/loras", content=never_read(), headers=headers)
    assert refused.status_code == 400, refused.text
    assert error_of(refused)["code"] == "invalid_request"
    assert "charset of an upload must be utf-8" in error_of(refused)["message"]


@pytest.mark.parametrize("charset", ["utf-8", '"UTF-8"', "utf8"])
async def test_fields_of_an_upload_are_read_as_utf8(charset: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    form: dict[str, Any] = {"files": [("files", ("x.txt", b"x"))], "data": {"name": "novel", "tags": "naïve"}}
    served = serve_plainly()
    async with http_of(served) as client:
        published = await client.post("/v1/loras", headers=headers, **form)
    assert published.status_code == 201, published.text
    [(item, _)] = served.store.called("stage")
    assert item.tags == ("naïve",)


class HeldStore(FakeStore):
    """Stages when the test permits."""

    let_go: asyncio.Event
    staging: asyncio.Event

    async def stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged:
        self.staging.set()
        await self.let_go.wait()
        return await super().stage(upload, shapes_by_model)


def upload(client: httpx.AsyncClient, num_bytes: int) -> Any:
    return client.post("/v1/loras", files=[("files", ("x.txt", b"x" * num_bytes))], data={"name": "novel"})


async def test_a_full_disk_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(max_size: int) -> BinaryIO:
        return Path("/dev/full").open("r+b")

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", full_disk)
    served: Served = serve_plainly()
    async with http_of(served) as client:
        refused = await upload(client, 9000)
    assert refused.status_code == 503 and error_of(refused)["code"] == "unavailable"
    assert "no disk space" in error_of(refused)["message"]
    assert served.services.uploads.num_bytes == 0


async def iter_bytes(count: int) -> AsyncIterator[bytes]:
    yield b"x" * count


@pytest.mark.parametrize("leaves", [False, True])
async def test_an_upload_counts_until_it_is_published_also_when_its_client_has_left(leaves: bool) -> None:
    store = HeldStore(pool_of(*POOL))
    store.let_go, store.staging = asyncio.Event(), asyncio.Event()
    served: Served = serve_plainly(
        store=store, admission={"max_weights_bytes": 1}, max_upload_total_bytes=LARGEST + 500
    )
    budget = served.services.uploads
    async with http_of(served) as client:
        first = asyncio.create_task(upload(client, 90))
        await store.staging.wait()
        held = budget.num_bytes
        assert 90 < held < 1000
        if leaves:
            first.cancel()
            await asyncio.wait([first])
            assert budget.num_bytes == held, "its publish continues"
        refused = await client.post(
            "/v1/loras",
            content=iter_bytes(LARGEST + 501 - held),
            headers={"content-type": "multipart/form-data; boundary=b", "content-length": str(LARGEST + 501 - held)},
        )
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "overloaded"
        store.let_go.set()
        await served.services.background.idle()
        if not leaves:
            assert (await first).status_code == 201
        assert budget.num_bytes == 0
        assert (await upload(client, 90)).status_code == 201


async def test_a_large_file_is_sent_in_parts_and_the_parts_are_deleted_after_the_stage() -> None:
    seen: list[tuple[str, list[int]]] = []
    content = bytes(range(256)) * (80 << 10)  # 20 MiB

    class WatchingStore(FakeStore):
        async def stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged:
            files = upload.files or {}
            for name, file in files.items():
                parts = self.parts[file.id] if isinstance(file, SentFile) else {0: file}
                assert b"".join(parts[number] for number in range(len(parts))) == sent[name]
                assert len(file) == len(sent[name])
                seen.append((name, [len(part) for part in parts.values()]))
            return await super().stage(upload, shapes_by_model)

    sent = {"adapter_model.safetensors": content, "adapter_config.json": b"{}"}
    store = WatchingStore(pool_of(*POOL))
    async with http_of(serve_plainly(store=store)) as client:
        files = [("files", item) for item in sent.items()]
        response = await client.post("/v1/loras", files=files, data={"name": "novel"})
    assert response.status_code == 201
    assert seen == [("adapter_model.safetensors", [8 << 20, 8 << 20, 4 << 20]), ("adapter_config.json", [2])]
    assert store.parts == {}


async def test_the_parts_of_an_upload_that_breaks_off_are_deleted() -> None:
    store = FakeStore(pool_of(*POOL))
    put_part = store.put_part

    async def failing(upload: str, number: int, data: Any) -> None:
        await put_part(upload, number, data)
        if number == 1:
            raise StoreUnavailable("full")

    store.put_part = failing  # type: ignore[method-assign]
    served = serve_plainly(store=store)
    async with http_of(served) as client:
        files = [("files", ("adapter_model.safetensors", b"x" * (20 << 20)))]
        response = await client.post("/v1/loras", files=files, data={"name": "novel"})
        await served.services.background.idle()
    assert response.status_code == 503
    assert store.parts == {}
