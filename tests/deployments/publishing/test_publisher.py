from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from threading import get_ident

import pytest
from ray.exceptions import RayActorError

from deployments.api.adapters import PublishItem
from deployments.api.responses import Published
from deployments.background import Background
from deployments.calls.typed_client import WAIT_S
from deployments.calls.worker_client import BaseWorkers, serve_worker
from deployments.errors import NoAnswerInTime, PoisonRequest, SourceMissing, WorkerStarting
from deployments.publishing.publisher import CATCH_UP_TIMEOUT_S
from deployments.publishing.validator import VALIDATED_TOGETHER
from gpu_worker.errors import AdapterUnfit
from lora_store import AdapterRecord, AdapterRefused, Key, Sample, StoreUnavailable, VersionConflict
from lora_store.errors import PublicNameTaken
from retriever_svc import StaleIndex
from tests.deployments.adapter_records import BASE, ENCODER, adapter, pool_of
from tests.deployments.fake_publishing import POET, Publishing, live
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import SHAPES, FakeWorker
from tests.fakes import FakeHandle
from tests.virtual_time import in_virtual_time


def test_results_are_in_order_and_a_refusal_does_not_affect_others() -> None:
    outcomes = Publishing()("bad-1", "poet", "mute", "gone", "wrong", "bare", "taken", "bad-2")
    kinds = [
        AdapterRefused,
        Published,
        Published,
        SourceMissing,
        AdapterUnfit,
        Published,
        AdapterRefused,
        AdapterRefused,
    ]
    assert [isinstance(outcome, kind) for outcome, kind in zip(outcomes, kinds, strict=True)] == [True] * len(kinds)
    assert [published.ref.name for published in live(outcomes)] == ["poet", "mute", "bare"]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, AdapterRefused)]
    assert [refused.name for refused in refusals] == ["bad-1", "taken", "bad-2"]


def test_all_valid_adapters_are_live_by_one_commit() -> None:
    publishing = Publishing()
    outcomes = publishing("bad", "other", "wrong", "bare")
    [(staged, embeddings, shifts, actor, *_)] = publishing.store.called("commit")
    assert [item.ref.name for item in staged] == ["other", "bare"]
    assert [None if embedding is None else embedding.encoder for embedding in embeddings] == [ENCODER, None]
    assert (shifts, actor) == ([0.5, 0.25], "tester")
    assert [(p.generation, p.probe_shift, p.found_by_auto) for p in live(outcomes)] == [
        (8, 0.5, True),
        (8, 0.25, False),
    ]
    assert [len(published.neighbours) for published in live(outcomes)] == [1, 0]


def test_many_are_validated_in_batches_and_live_by_one_commit() -> None:
    publishing = Publishing()
    names = [f"a{number:03}" for number in range(2 * VALIDATED_TOGETHER + 1)]
    assert [published.ref.name for published in live(publishing(*names))] == names
    batches = [VALIDATED_TOGETHER, VALIDATED_TOGETHER, 1]
    assert [len(groups) for groups, _ in publishing.retriever.called("embed")] == batches
    assert [len(digests) for (digests,) in publishing.worker.called("probe_many")] == batches
    assert [len(staged) for staged, *_ in publishing.store.called("commit")] == [len(names)]


def test_each_step_gets_the_adapters_that_passed_the_previous_one() -> None:
    publishing = Publishing()
    publishing("bad", "poet", "bare")
    assert [given for _, given in publishing.store.called("stage")] == [{BASE: SHAPES}] * 3
    assert publishing.retriever.called("embed") == [([(Sample("one"), Sample("two")), ()], ["local", "local"])]
    probed = [adapter(name).weights_digest for name in ("poet", "bare")]
    assert publishing.worker.called("probe_many") == [(probed,)]


@pytest.mark.parametrize("is_dry", [False, True])
def test_an_adapter_within_rounding_is_live_with_a_warning(is_dry: bool) -> None:
    publishing = Publishing()
    uploads = [PublishItem(Path("folders", name)) for name in ("mute", "poet")]
    first = publishing.run(lambda publisher: publisher.publish(uploads, "tester", is_dry=is_dry))
    again = publishing.run(lambda publisher: publisher.publish(uploads, "tester", is_dry=is_dry))
    for mute, poet in (first, again):
        [warning] = mute.warnings
        assert "no more than rounding" in warning and "trained too briefly" in warning
        assert poet.warnings == ()


@pytest.mark.parametrize("names", [("bad",), ("wrong",), ("taken",), ()])
def test_without_a_valid_adapter_nothing_is_stored(names: tuple[str, ...]) -> None:
    publishing = Publishing()
    assert live(publishing(*names)) == []
    assert (publishing.pool.live, publishing.pool.held) == ({}, [])
    assert publishing.retriever.called("catch_up") == []


def test_a_taken_name_is_refused_and_the_others_are_published() -> None:
    publishing = Publishing()
    outcomes = publishing("poet", "taken", "bard")
    assert [published.ref.name for published in live(outcomes)] == ["poet", "bard"]
    assert [[item.ref.name for item in staged] for staged, *_ in publishing.store.called("commit")] == [
        ["poet", "taken", "bard"],
        ["poet", "bard"],
    ]
    assert publishing.pool.held == []


def test_adapters_refused_late_are_released_everywhere() -> None:
    publishing = Publishing()
    publishing("poet", "wrong")
    assert [[item.ref.name for item in staged] for (staged,) in publishing.store.called("discard")] == [["wrong"]]
    assert publishing.worker.called("forget") == [([adapter("wrong").weights_digest],)] * 2
    assert publishing.pool.swept == sorted(adapter("wrong").blobs)


def test_one_folder_given_twice_is_published_once() -> None:
    publishing = Publishing()
    assert [published.generation for published in live(publishing("poet", "poet"))] == [8, 8]
    assert [len(staged) for staged, *_ in publishing.store.called("commit")] == [1]
    assert publishing.worker.called("probe_many") == [([adapter("poet").weights_digest],)]
    assert publishing.pool.held == []


@pytest.mark.parametrize(
    "error", [StoreUnavailable("down"), VersionConflict(3), RayActorError()], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("method", ["versions", "commit"])
def test_a_store_that_fails_midway_leaves_nothing(method: str, error: Exception) -> None:
    num_failures = 3 if isinstance(error, RayActorError) else 1  # a call whose replica died is repeated twice
    publishing = Publishing(failing={method: (error, num_failures)})
    with pytest.raises(PoisonRequest if num_failures == 3 else type(error)):
        publishing("poet", "bare")
    is_unsure = method == "commit" and not isinstance(
        error, VersionConflict
    )  # it may be live, so the leases must remain
    assert (publishing.pool.live, len(publishing.pool.held)) == ({}, 2 if is_unsure else 0)
    assert publishing.pool.swept == ([] if is_unsure else publishing.pool.swept)
    assert publishing.retriever.called("catch_up") == []
    assert len(live(publishing("poet", "bare"))) == 2, "a retry succeeds"


@pytest.mark.parametrize("change", ["publish", "rollback", "withdraw", "set_visibility"])
@in_virtual_time
async def test_a_store_without_a_replica_ends_the_change_in_time(change: str) -> None:
    class AbsentStore(FakeStore):
        async def ping(self) -> None:
            await asyncio.Event().wait()

        async def active_encoder(self) -> str | None:
            await asyncio.Event().wait()
            raise AssertionError

        async def versions(self, keys: Collection[Key]) -> dict[Key, tuple[AdapterRecord, ...]]:
            await asyncio.Event().wait()
            raise AssertionError

    publishing = Publishing()
    publishing.store = FakeHandle(AbsentStore(pool_of(adapter("poet"))))
    publisher = publishing.publisher(Background())
    changes: dict[str, Callable[[], Awaitable[object]]] = {
        "publish": lambda: publisher.publish([PublishItem(Path("bard"))], "tester"),
        "rollback": lambda: publisher.rollback(POET, None, "tester"),
        "withdraw": lambda: publisher.withdraw("local", ["poet"], "tester"),
        "set_visibility": lambda: publisher.set_visibility(POET, "private", "tester"),
    }
    with pytest.raises(StoreUnavailable, match="no replica answered within 60 s"):
        await changes[change]()
    assert asyncio.get_running_loop().time() == WAIT_S
    reads = {"withdraw": "versions", "set_visibility": "ping"}
    assert [call.name for call in publishing.store.calls] == [reads.get(change, "active_encoder")]


def test_a_withdrawal_whose_store_dies_after_the_commit_happens_once() -> None:
    publishing = Publishing(adapter("poet"), dying={"withdraw": 1})
    assert publishing.withdraw("poet").generation == publishing.pool.generation == 8
    assert publishing.pool.live == {}


def test_a_publish_whose_store_dies_after_the_commit_happens_once_and_every_publish_has_its_own_id() -> None:
    publishing = Publishing(dying={"commit": 1})
    assert [published.generation for name in ("poet", "bard") for published in live(publishing(name))] == [8, 9]
    first, again, other = [call[-1] for call in publishing.store.called("commit")]
    assert first == again != other


def test_a_failed_stage_affects_only_its_adapter() -> None:
    outcomes = Publishing(failing={"stage": (StoreUnavailable("down"), 1)})("poet", "bard")
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, StoreUnavailable)] != []
    assert [published.ref.name for published in live(outcomes)] == ["bard"]


def test_a_retriever_that_cannot_embed_leaves_nothing() -> None:
    publishing = Publishing(retriever=FakeHandle(FakeRetriever(unfit=RayActorError())))
    with pytest.raises(PoisonRequest):
        publishing("poet", "bard")
    assert (publishing.pool.live, publishing.pool.held) == ({}, [])
    assert publishing.store.called("commit") == []


def test_a_lost_store_is_logged_and_the_rest_is_left_to_gc(caplog: pytest.LogCaptureFixture) -> None:
    down = (StoreUnavailable("down"), 9)
    publishing = Publishing(
        failing={"versions": down, "discard": down, "unreferenced": (StoreUnavailable("down"), 999)}
    )
    with pytest.raises(StoreUnavailable):
        publishing("poet")
    assert publishing.pool.live == {}
    assert (caplog.records[0].levelname, caplog.records[-1].levelname) == ("WARNING", "ERROR")


async def test_a_client_that_leaves_does_not_stop_its_publish() -> None:
    publishing, background = Publishing(), Background()
    client = asyncio.create_task(publishing.publisher(background).publish([PublishItem(Path("poet"))], "tester"))
    await asyncio.sleep(0)
    client.cancel()
    await asyncio.wait([client])
    assert publishing.pool.live == {}, "it was over before the client left"
    await background.idle()
    assert publishing.pool.held == []
    assert list(publishing.pool.live) == [POET]


def test_replicas_that_do_not_catch_up_are_counted_as_behind() -> None:
    late = FakeRetriever(caught_up=StaleIndex(8, 7))
    retriever = FakeHandle(FakeRetriever(), late, FakeRetriever())
    [published] = live(Publishing(retriever=retriever)("poet"))
    assert (published.ready, published.behind) == (2, 1)
    assert retriever.called("catch_up") == [(8,)]
    assert retriever.timeouts_s == [CATCH_UP_TIMEOUT_S]


def test_a_silent_replica_does_not_affect_the_commit() -> None:
    [published] = live(Publishing(retriever=FakeHandle(FakeRetriever(), num_silent=1))("poet"))
    assert published.generation == 8
    assert published.behind >= 1


def test_live_versions_are_neither_probed_nor_committed_again() -> None:
    publishing = Publishing(adapter("poet", generation=3))
    [published] = live(publishing("poet"))
    assert (published.ref.name, published.generation, published.ready) == ("poet", 3, 1)
    assert publishing.worker.called("probe_many") == []
    assert publishing.store.called("commit") == []
    assert publishing.retriever.called("catch_up") == [(3,)]
    assert (publishing.pool.held, publishing.pool.swept) == ([], [])


@pytest.mark.parametrize("active", ["new-encoder", None])  # None: before the first reindex
def test_live_versions_embedded_by_an_older_encoder_are_published_again(active: str | None) -> None:
    publishing = Publishing(adapter("poet"), adapter("bare", samples=False))
    publishing.pool.encoder = active
    publishing.retriever = FakeHandle(FakeRetriever(encoder="new-encoder"))
    assert [published.generation for published in live(publishing("poet", "bare"))] == [8, 1]
    [(_, [embedding], *_)] = publishing.store.called("commit")
    assert embedding.encoder == "new-encoder"


def test_new_and_live_adapters_are_ready_at_the_new_generation() -> None:
    publishing = Publishing(adapter("bard", generation=3))
    assert [item.generation for item in live(publishing("bard", "poet"))] == [3, 8]
    assert publishing.retriever.called("catch_up") == [(8,)]


def test_a_publish_asks_only_the_workers_of_its_own_base_model() -> None:
    publishing, other = Publishing(), FakeHandle(FakeWorker())
    publishing.workers["other"] = BaseWorkers(serve_worker(other), 60.0)
    publishing.pool.without_shapes = BASE, "other"
    uploads = [PublishItem(Path("folders", name), base_model=BASE) for name in ("poet", "bard")]
    assert len(live(publishing.run(lambda publisher: publisher.publish(uploads, "tester")))) == 2
    assert [call.name for call in publishing.worker.calls] == ["module_shapes", "module_shapes", "probe_many"]
    assert other.calls == []


class Absent(FakeWorker):
    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        await asyncio.Event().wait()
        return {}


def test_an_adapter_of_a_base_model_without_a_worker_does_not_stop_the_others() -> None:
    publishing, other = Publishing(), FakeHandle(Absent())
    publishing.workers["other"] = BaseWorkers(serve_worker(other), 0.01)
    publishing.pool.without_shapes = BASE, "other"
    names = (("poet", BASE), ("bard", "other"), ("scribe", "other"))
    uploads = [PublishItem(Path("folders", name), base_model=base_model) for name, base_model in names]
    published, *refused = publishing.run(lambda publisher: publisher.publish(uploads, "tester"))
    assert published.ref.name == "poet" and [type(error) for error in refused] == [WorkerStarting] * 2
    assert len(other.called("module_shapes")) == 1
    with pytest.raises(WorkerStarting):
        publishing.run(lambda publisher: publisher.publish(uploads[1:], "tester"))


@in_virtual_time
async def test_a_change_without_a_worker_ends_in_a_minute_and_leaves_nothing() -> None:
    publishing = Publishing(adapter("poet"), adapter("poet", version="older"))
    publishing.worker = FakeHandle(Absent())
    publisher, held, left = publishing.publisher(Background()), ExitStack(), list[str]()
    held.callback(left.append, "the upload's budget")
    with pytest.raises(NoAnswerInTime):
        await publisher.publish([PublishItem(Path("new"))], "tester", held=held)
    assert left == ["the upload's budget"]
    with pytest.raises(NoAnswerInTime):
        await publisher.rollback(POET, None, "tester")
    assert asyncio.get_running_loop().time() == 2 * WAIT_S
    assert (publishing.pool.held, publishing.store.called("stage")) == ([], [])


def test_a_dry_run_validates_and_leaves_nothing() -> None:
    publishing = Publishing()
    uploads = [PublishItem(Path("folders", name)) for name in ("bad", "other", "wrong", "bare", "taken")]
    uploads.append(PublishItem(Path("folders", "new"), share=0.1))
    outcomes = publishing.run(lambda publisher: publisher.publish(uploads, "tester", is_dry=True))
    kinds = [AdapterRefused, Published, AdapterUnfit, Published, PublicNameTaken, AdapterRefused]
    assert [isinstance(outcome, kind) for outcome, kind in zip(outcomes, kinds, strict=True)] == [True] * 6
    assert [(p.generation, p.found_by_auto, len(p.neighbours)) for p in live(outcomes)] == [(0, True, 1), (0, False, 0)]
    assert (publishing.pool.live, publishing.pool.held, publishing.pool.generation) == ({}, [], 7)
    assert publishing.store.called("commit") == publishing.retriever.called("catch_up") == []


@pytest.mark.parametrize("is_dry", [False, True])
def test_warnings_are_found_beside_the_event_loop(is_dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr("deployments.publishing.results.wording_warning", lambda _: threads.append(get_ident()))
    upload = PublishItem(Path("folders", "poet"))
    Publishing().run(lambda publisher: publisher.publish([upload], "tester", is_dry=is_dry))
    assert len(threads) == 1 and get_ident() not in threads


def test_a_dry_run_beside_another_publish_of_the_name_is_fit() -> None:
    publishing = Publishing(failing={"check_commit": (VersionConflict(1), 9)})
    upload = PublishItem(Path("folders", "poet"))
    [outcome] = publishing.run(lambda publisher: publisher.publish([upload], "tester", is_dry=True))
    assert isinstance(outcome, Published) and publishing.pool.held == []
