"""The Store deployment over a real store in a folder."""

from __future__ import annotations

import asyncio
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import deployments.publishing.source_folders
import deployments.store
from deployments.api.adapters import PublishItem, SentFile
from deployments.calls.catalogue_clients import Buffer
from deployments.config.app import OTHER_FILES_BYTES
from deployments.config.served_model import ServedModel
from deployments.errors import SourceMissing, SourceRefused, UploadDiskFull
from deployments.store import StoreDeployment
from lora_store import (
    AdapterNotFound,
    AdapterRef,
    AdapterRefused,
    BlobCorrupted,
    Edit,
    Embedding,
    Key,
    LoraStore,
    QuotaExceeded,
    Ranking,
    Sample,
    Staged,
    StoreUnavailable,
    TenantQuota,
    decode_weights,
)
from lora_store.rankings import OUTCOME, RankedAdapter
from lora_store.usage import UsageFiles, UsageQuery
from tests.deployments.adapter_records import BASE, write_random_folder
from tests.deployments.app_fakes import config_of
from tests.deployments.fake_worker import SHAPES
from tests.deployments.publishing.local_hub import local_hub
from tests.locked import lock

UNIT = np.array([1.0, 0.0], np.float32)
POET = ("local", "poet")


class Stores:
    """A StoreDeployment whose references are the buffers themselves."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.put: list[Buffer] = []
        config = config_of(store_uri=str(folder / "pool"), **settings)
        self.deployment = StoreDeployment(config, put=self._put)

    def _put(self, buffer: Buffer) -> Buffer:
        self.put.append(buffer)
        return buffer

    def adapter(self, name: str = "poet", seed: int = 0) -> Path:
        return write_random_folder(self.folder / str(seed) / name, seed, ["Rhyme.", "Sing."])

    async def stage(self, upload: PublishItem) -> Staged:
        return await self.deployment.stage(upload, {BASE: SHAPES})

    async def publish(self, *uploads: PublishItem) -> list[Staged]:
        staged = [await self.stage(upload) for upload in uploads]
        embeddings = [Embedding("enc", UNIT, UNIT)] * len(staged)
        await self.deployment.commit(staged, embeddings, [0.5] * len(staged), "tester")
        return staged

    @property
    def stored(self) -> set[str]:
        """Return the digests of the blobs on disk."""
        return {path.name for path in (self.folder / "pool" / "blobs").rglob("*") if path.is_file()}


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    return Stores(tmp_path)


def files_of(folder: Path) -> dict[str, bytes | SentFile]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", [BASE, f"somewhere/{BASE}"])
async def test_no_adapter_may_have_the_base_models_name(stores: Stores, name: str) -> None:
    for upload in (
        PublishItem(Path("x"), name),
        PublishItem(Path("somewhere", BASE)),
        PublishItem(source=f"s3://{name}"),
    ):
        with pytest.raises(AdapterRefused, match="this is a name of the base model; choose another"):
            await stores.stage(upload)


async def test_a_version_does_not_depend_on_its_source_and_keeps_its_label(tmp_path: Path) -> None:
    stores = Stores(tmp_path, source_prefixes=(f"file://{tmp_path}",))
    folder = stores.adapter("elsewhere")
    uploads = [PublishItem(folder), PublishItem(files=files_of(folder)), PublishItem(source=f"file://{folder}")]
    labelled = [replace(upload, name="poet", tags=("b", "a"), template="chat") for upload in uploads]
    path, *others = [await stores.stage(upload) for upload in labelled]
    assert (path.samples, path.record.tags, path.record.template) == (
        (Sample("Rhyme."), Sample("Sing.")),
        ("a", "b"),
        "chat",
    )
    assert [(staged.ref, staged.samples) for staged in others] == [(path.ref, path.samples)] * 2
    assert [staged.record.source for staged in (path, *others)] == ["poet", "poet", f"file://{folder}"]


@pytest.mark.parametrize("prefix", [None, "file://"])
async def test_a_folder_that_the_server_may_not_enter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str | None
) -> None:
    stores = Stores(tmp_path, source_prefixes=(f"file://{tmp_path}",))
    folder = stores.adapter()
    upload = PublishItem(folder) if prefix is None else PublishItem(source=f"{prefix}{folder}", name="poet")
    lock(folder, monkeypatch)
    with pytest.raises(AdapterRefused, match="'poet' cannot be read: Permission denied"):
        await stores.stage(upload)


async def test_only_weights_that_others_may_change_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy fails here as on a full disk."""

    def full_disk() -> BinaryIO:
        return Path("/dev/full").open("r+b")

    monkeypatch.setattr("lora_store.bounded_files._MAPPED_BYTES", 0)
    monkeypatch.setattr("lora_store.bounded_files.tempfile.TemporaryFile", full_disk)
    stores = Stores(tmp_path, source_prefixes=(f"file://{tmp_path}", "hf://acme"))
    folder = stores.adapter()
    files = files_of(folder)
    for shared in (PublishItem(folder), PublishItem(source=f"file://{folder}")):
        with pytest.raises(UploadDiskFull, match="no disk space"):
            await stores.stage(shared)
    with local_hub(repositories={"acme/poet@main": files}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for own in (PublishItem(files=files, name="poet"), PublishItem(source="hf://acme/poet")):
            assert (await stores.stage(own)).ref.name == "poet"


async def test_a_tenant_publishes_only_from_below_its_own_prefixes(tmp_path: Path) -> None:
    stores = Stores(tmp_path, source_prefixes={"acme": (f"file://{tmp_path}",)})
    upload = PublishItem(source=f"file://{stores.adapter('elsewhere')}", name="poet", tenant="acme")
    assert (await stores.stage(upload)).ref.tenant == "acme"
    with pytest.raises(SourceRefused):
        await stores.stage(replace(upload, tenant="globex"))


async def test_a_file_sent_in_parts_is_the_same_version(stores: Stores) -> None:
    folder, id = stores.adapter(), "0" * 32
    content = (folder / "adapter_model.safetensors").read_bytes()
    for number, start in enumerate(range(0, len(content), 100)):
        await stores.deployment.put_part(id, number, np.frombuffer(content[start : start + 100], np.uint8))
    files = files_of(folder) | {"adapter_model.safetensors": SentFile(id, len(content))}
    staged, expected = (
        await stores.stage(PublishItem(files=files, name="poet")),
        await stores.stage(PublishItem(folder)),
    )
    assert staged.ref == expected.ref
    await stores.deployment.delete_parts([id])
    assert list((stores.folder / "pool" / "uploads").iterdir()) == []
    with pytest.raises(StoreUnavailable):
        await stores.stage(PublishItem(files=files, name="poet"))


async def test_the_settings_of_admission_bound_an_adapter_and_its_upload(tmp_path: Path) -> None:
    stores = Stores(tmp_path, admission={"max_weights_bytes": 1000, "max_rank": 1})
    with pytest.raises(AdapterRefused, match="has rank 2, must be 1 to 1"):
        await stores.stage(PublishItem(stores.adapter()))
    files = files_of(stores.adapter()) | {"adapter_model.safetensors": b"x" * (1001 + OTHER_FILES_BYTES)}
    with pytest.raises(AdapterRefused, match=f"at most {1000 + OTHER_FILES_BYTES}"):
        await stores.stage(PublishItem(files=files, name="poet"))


async def test_a_refused_or_discarded_upload_leaves_nothing(stores: Stores) -> None:
    folder = stores.adapter()
    with pytest.raises(QuotaExceeded):
        await stores.stage(PublishItem(folder, quota=TenantQuota(max_adapters=0)))
    assert stores.stored == set()
    with pytest.raises(AdapterRefused, match="pickle"):
        await stores.stage(PublishItem(files=files_of(folder) | {"adapter_model.bin": b"pickle"}, name="poet"))
    assert stores.stored == set()
    staged = await stores.stage(PublishItem(folder))
    assert stores.stored == set(staged.record.blobs)
    await stores.deployment.discard([staged])
    assert stores.stored == set()


async def test_versions_are_listed_live_one_first_and_can_be_staged_again(stores: Stores) -> None:
    first, second = [(await stores.publish(PublishItem(stores.adapter(seed=seed))))[0] for seed in (1, 2)]
    versions = await stores.deployment.versions([POET, ("local", "nobody")])
    assert [record.ref for record in versions[POET]] == [second.ref, first.ref]
    for record in versions[POET]:
        assert record.embedding is not None
        assert (record.encoder, record.embedding.vector.size, record.embedding.own_scores.size) == ("enc", 0, 0)
    assert list(versions) == [POET]
    staged = await stores.deployment.restage(versions[POET][1])
    assert (staged.ref, staged.samples) == (first.ref, first.samples)
    await stores.deployment.commit([staged], [Embedding("enc", UNIT, UNIT)], [0.5], "tester")
    assert (await stores.deployment.versions([POET]))[POET][0].ref == first.ref


async def test_a_withdrawn_adapters_blobs_are_unreferenced_and_swept(stores: Stores) -> None:
    poet, bard = await stores.publish(PublishItem(stores.adapter()), PublishItem(stores.adapter("bard", 1)))
    blobs = [*poet.record.blobs, *bard.record.blobs]
    assert await stores.deployment.unreferenced(blobs) == []
    withdrawn = await stores.deployment.withdraw("local", ["poet"], "tester")
    assert [record.ref for record in withdrawn.records] == [poet.ref]
    assert await stores.deployment.unreferenced(blobs) == [poet.weights_digest], "they share their samples"
    assert await stores.deployment.sweep(blobs) == [poet.weights_digest]
    assert stores.stored == set(bard.record.blobs)
    with pytest.raises(AdapterNotFound):
        await stores.deployment.withdraw("local", ["bard", "poet"], "tester")
    assert POET not in await stores.deployment.versions([POET])


async def test_weights_are_one_reference_kept_until_it_is_released(stores: Stores) -> None:
    [staged] = await stores.publish(PublishItem(stores.adapter()))
    [ref] = await stores.deployment.fetch(staged.weights_digest)
    assert decode_weights(staged.weights_digest, ref).weights_digest == staged.weights_digest
    await stores.deployment.fetch(staged.weights_digest)
    assert len(stores.put) == 1
    assert await stores.deployment.release([staged.weights_digest]) is True
    await stores.deployment.fetch(staged.weights_digest)
    assert len(stores.put) == 2
    with pytest.raises(AdapterNotFound):
        await stores.deployment.fetch("f" * 64)


async def test_a_damaged_file_is_noticed_by_its_reader_and_reported_once_it_is_suspect(stores: Stores) -> None:
    [staged] = await stores.publish(PublishItem(stores.adapter()))
    digest = staged.weights_digest
    [path] = (stores.folder / "pool" / "blobs").rglob(digest)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    [ref] = await stores.deployment.fetch(digest)
    with pytest.raises(BlobCorrupted):
        decode_weights(digest, ref)
    with pytest.raises(BlobCorrupted):
        await stores.deployment.fetch(digest, is_suspect=True)
    path.write_bytes(good)
    [ref] = await stores.deployment.fetch(digest, is_suspect=True)
    assert decode_weights(digest, ref), "the damaged bytes were not kept"


async def test_verify_reads_every_blob_again(stores: Stores) -> None:
    assert [verified async for verified in stores.deployment.verify("local")] == []
    [staged] = await stores.publish(PublishItem(stores.adapter()))
    [path] = (stores.folder / "pool" / "blobs").rglob(staged.weights_digest)
    path.write_bytes(b"damaged")
    found = [verified async for verified in stores.deployment.verify("local")]
    assert [(verified.done, verified.total) for verified in found] == [(1, 2), (2, 2)]
    problems = {verified.check.digest: verified.check.problem for verified in found}
    assert problems.keys() == set(staged.record.blobs)
    assert "corrupted" in (problems[staged.weights_digest] or "")
    assert problems[staged.record.samples_digest or ""] is None


async def test_the_encoder_that_was_activated_is_known(stores: Stores) -> None:
    assert await stores.deployment.active_encoder() is None
    await stores.deployment.activate_encoder("model", "new", "tester")
    assert await stores.deployment.active_encoder() == "new"


async def test_tenants_with_applied_outcomes_are_found(stores: Stores) -> None:
    [poet] = await stores.publish(PublishItem(stores.adapter()))
    measured = Ranking(poet.ref, (RankedAdapter(poet.ref, 1.0, 1, False),), "encoder", UNIT, UNIT)
    await stores.deployment.rank("measured", [measured], "tester")
    said = replace(measured, anchor=AdapterRef("judging", f"{OUTCOME}1", ""))
    await stores.deployment.rank("judging", [said], "tester", are_outcomes=True)
    assert await stores.deployment.tenants_with_outcomes() == ["judging"]


async def test_a_tenants_slow_sources_leave_room_for_the_uploads_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    released, begun = threading.Event(), threading.Semaphore(0)

    def slow_hub(*_: object, **__: object) -> Path:
        begun.release()
        released.wait(60)
        raise SourceMissing("x")

    monkeypatch.setattr(deployments.publishing.source_folders, "copy_over_http", slow_hub)
    stores = Stores(tmp_path, keys_file=tmp_path / "keys.yaml", source_prefixes={"a": ("hf://a",)})
    slow = [
        asyncio.create_task(
            stores.deployment.stage(PublishItem(name="x", tenant="a", source="hf://a/x"), {BASE: SHAPES})
        )
        for _ in range(64)
    ]
    for _ in range(8):
        assert await asyncio.to_thread(begun.acquire, timeout=60)
    with pytest.raises(AdapterRefused):
        async with asyncio.timeout(60):
            await stores.deployment.stage(
                PublishItem(name="x", tenant="b", files={"adapter_config.json": b"{}"}), {BASE: SHAPES}
            )
    assert not any(call.done() for call in slow)
    released.set()
    assert all(isinstance(error, SourceMissing) for error in await asyncio.gather(*slow, return_exceptions=True))


async def test_waiting_commits_of_one_tenant_hold_up_no_other_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys.yaml").write_text("[]")
    stores = Stores(tmp_path, keys_file=tmp_path / "keys.yaml")
    [poet] = await stores.publish(PublishItem(stores.adapter()))
    goes_on, begun = threading.Event(), queue.Queue[str]()

    def hang(_: object, key: Key, *__: object) -> int:
        begun.put(key[0])
        assert goes_on.wait(60)
        return 2

    monkeypatch.setattr(LoraStore, "set_name", hang)
    naming = [asyncio.create_task(stores.deployment.set_name((tenant, "n"), "{}", "me")) for tenant in "a" * 64 + "b"]
    assert sorted([await asyncio.to_thread(begun.get, timeout=60) for _ in range(3)]) == ["a", "a", "b"]
    async with asyncio.timeout(60):
        assert (await stores.deployment.versions([POET]))[POET]
        assert await stores.deployment.fetch(poet.record.weights_digest)
    goes_on.set()
    assert await asyncio.gather(*naming) == [2] * 65


async def test_reports_of_usage_are_made_one_at_a_time_also_after_their_callers_have_left(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, begun = threading.Event(), queue.Queue[str | None]()

    def hang(_: object, query: UsageQuery) -> list[Any]:
        begun.put(query.tenant)
        assert goes_on.wait(60)
        return []

    monkeypatch.setattr(UsageFiles, "sums", hang)
    day = date(2026, 11, 1)

    def ask(tenant: str) -> asyncio.Task[Any]:
        return asyncio.create_task(stores.deployment.usage(UsageQuery(day, day, tenant=tenant)))

    left = [ask("a") for _ in range(5)]
    assert await asyncio.to_thread(begun.get, timeout=60) == "a"
    for call in left:
        call.cancel()
    await asyncio.wait(left)
    waiting = [*[ask("a") for _ in range(5)], ask("b")]
    await asyncio.sleep(0)  # they are in the queue
    assert begun.empty()
    goes_on.set()
    assert await asyncio.gather(*waiting) == [[]] * 6
    assert "b" in (begun.get(), begun.get()), "tenants take turns"


async def test_an_edit_cannot_name_a_chat_template_that_the_base_model_does_not_have(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServedModel, "known_templates", {})
    [poet] = await stores.publish(PublishItem(stores.adapter(), "poet"))
    with pytest.raises(AdapterRefused, match="has no chat template"):
        await stores.deployment.edit(poet.record, Edit(template="chat"))


async def test_the_check_of_an_edited_contract_holds_up_no_other_call(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def check(name: str, data: bytes, context: int | None = None) -> tuple[str, tuple[str, ...]]:
        released.wait(60)
        return data.decode(), ()

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    [poet] = await stores.publish(PublishItem(stores.adapter(), "poet"))
    monkeypatch.setattr(deployments.store, "read_contract", check)
    editing = asyncio.create_task(stores.deployment.edit(poet.record, Edit(contract='{"stop":["."]}')))
    await asyncio.sleep(0)  # the edit has its thread
    found = await stores.deployment.versions([POET])
    assert not editing.done() and len(found[POET]) == 1
    released.set()
    assert (await editing).record.contract == '{"stop":["."]}'
