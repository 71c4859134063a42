from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from ray.exceptions import RayActorError

from deployments.calls.catalogue_clients import serve_retriever
from deployments.calls.worker_client import serve_worker
from deployments.errors import PoisonRequest
from deployments.publishing.results import find_warnings
from deployments.publishing.validator import (
    VALIDATED_TOGETHER,
    AdapterValidator,
    Outcome,
    ValidatedAdapter,
    free_of_charge,
)
from lora_store import AdapterRefused, Sample, Staged
from lora_store.validation import NEVER_TRAINED
from retriever_svc.route import Embedded
from tests.deployments.adapter_records import adapter
from tests.deployments.fake_publishing import workers_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import FakeWorker
from tests.fakes import FakeHandle

BAD = (Sample("bad"),)


def staged(name: str) -> Staged:
    return Staged(adapter(name), (), "hold")


def validate(*items: Staged, worker: FakeWorker) -> list[Outcome]:
    workers = workers_of(serve_worker(FakeHandle(worker)))
    validator = AdapterValidator(serve_retriever(FakeHandle(FakeRetriever())), workers)
    return asyncio.run(validator.validate(items, {}, free_of_charge))


def test_the_warning_of_the_folder_replaces_that_of_the_probe() -> None:
    mute = Staged(adapter("mute"), (), "hold", warnings=(NEVER_TRAINED,))
    assert find_warnings(mute, 0.0) == (NEVER_TRAINED,)
    unlisted = replace(mute, record=replace(mute.record, expires_at=mute.record.created_at))
    assert find_warnings(unlisted, 0.0) == ()


def test_a_reading_of_other_names_hides_no_warning_of_the_probe() -> None:
    respelled = Staged(adapter("mute"), (), "hold", warnings=("6 tensor names were read",))
    first, second = find_warnings(respelled, 0.0)
    assert first == "6 tensor names were read" and "by no more than rounding" in second
    assert find_warnings(respelled, 0.2) == ("6 tensor names were read",)


def test_two_batches_are_validated_concurrently() -> None:
    class Waiting(FakeWorker):
        """Answers the first call when it has received two."""

        def __init__(self) -> None:
            super().__init__()
            self.has_two = asyncio.Barrier(2)

        async def probe_many(self, weights_digests: list[str]) -> list[float | Exception]:
            async with asyncio.timeout(120):  # reached only if the second call never arrives
                await self.has_two.wait()
            return await super().probe_many(weights_digests)

    items = [staged(f"a{number}") for number in range(2 * VALIDATED_TOGETHER)]
    outcomes = validate(*items, worker=Waiting())
    assert [outcome.staged for outcome in outcomes if isinstance(outcome, ValidatedAdapter)] == items


def test_samples_without_an_embedding_refuse_their_adapter_only() -> None:
    class Overflowing(FakeRetriever):
        async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]:
            embedded = await super().embed(groups, tenants)
            return [None if group == BAD else item for group, item in zip(groups, embedded, strict=True)]

    items = [staged("bare"), replace(staged("bad"), samples=BAD), replace(staged("good"), samples=(Sample("x"),))]
    validator = AdapterValidator(
        serve_retriever(FakeHandle(Overflowing())), workers_of(serve_worker(FakeHandle(FakeWorker())))
    )
    bare, bad, good = asyncio.run(validator.validate(items, {}, free_of_charge))
    assert isinstance(bare, ValidatedAdapter) and isinstance(good, ValidatedAdapter)
    assert isinstance(bad, AdapterRefused) and bad.name == "bad"
    assert "no finite vector" in str(bad)
    record = replace(items[2].record, samples_digest="others")
    [again] = asyncio.run(validator.restaged([good], [replace(items[2], record=record, samples=BAD)])).values()
    assert isinstance(again, AdapterRefused) and again.name == "good"


def test_workers_that_die_are_each_adapters_error() -> None:
    outcomes = validate(staged("one"), staged("two"), worker=FakeWorker(failure=RayActorError()))
    assert [type(outcome) for outcome in outcomes] == [PoisonRequest, PoisonRequest]
