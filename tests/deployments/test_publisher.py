from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from deployments.publisher import CATCH_UP_TIMEOUT_S, Published, Publisher
from deployments.store import FolderUpload
from gpu_worker.errors import AdapterUnfit
from lora_store import AdapterRefused, Sample, VersionConflict
from retriever_svc import StaleIndex
from tests.deployments.app_fakes import FakeRetriever, FakeStore, FakeWorker
from tests.fakes import FakeHandle
from tests.retriever_svc.pool_fakes import record_of

SHIFTS = {
    record_of("mute", None).weights_digest: 0.0,
    record_of("wrong", None).weights_digest: AdapterUnfit("it is for another base"),
    record_of("bare", None).weights_digest: 0.25,
}


class Publishing:
    """A Publisher over fakes, and its handles."""

    def __init__(self, retriever: FakeHandle | None = None, store: FakeStore | None = None) -> None:
        self.store = FakeHandle(store or FakeStore())
        self.retriever = retriever or FakeHandle(FakeRetriever())
        self.worker = FakeHandle(FakeWorker(shifts=SHIFTS))

    def __call__(self, *names: str) -> list[Published | Exception]:
        uploads = [FolderUpload(Path("folders", name)) for name in names]
        publisher = Publisher(self.store, self.retriever, self.worker)
        return asyncio.run(publisher.publish(uploads, actor="tester"))


def live(outcomes: Sequence[Published | Exception]) -> list[Published]:
    return [outcome for outcome in outcomes if isinstance(outcome, Published)]


def test_results_come_in_the_order_of_the_uploads_and_a_refusal_hurts_no_other() -> None:
    outcomes = Publishing()("bad-1", "poet", "mute", "wrong", "bare", "bad-2")
    kinds = [AdapterRefused, Published, AdapterRefused, AdapterUnfit, Published, AdapterRefused]
    assert [isinstance(outcome, kind) for outcome, kind in zip(outcomes, kinds, strict=True)] == [True] * 6
    assert [published.ref.name for published in live(outcomes)] == ["poet", "bare"]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, AdapterRefused)]
    assert [refused.name for refused in refusals] == ["bad-1", "mute", "bad-2"]


def test_all_that_is_good_is_live_by_one_commit() -> None:
    publishing = Publishing()
    outcomes = publishing("bad", "poet", "mute", "bare")
    [(staged, embeddings, encoder, shifts, actor)] = publishing.store.called("commit")
    assert [item.ref.name for item in staged] == ["poet", "bare"]
    assert (embeddings, encoder, shifts, actor) == ([(2.0, 0.0), None], "fake-encoder", [0.5, 0.25], "tester")
    assert [(p.generation, p.probe_shift, p.found_by_auto) for p in live(outcomes)] == [
        (8, 0.5, True),
        (8, 0.25, False),
    ]
    assert [len(published.neighbours) for published in live(outcomes)] == [1, 0]


def test_each_step_sees_what_the_step_before_let_through() -> None:
    publishing = Publishing()
    publishing("bad", "poet", "bare")
    shapes = asyncio.run(FakeWorker().module_shapes())
    assert [given for _, given in publishing.store.called("stage")] == [shapes] * 3
    assert publishing.retriever.called("embed") == [([(Sample("one"), Sample("two")), ()],)]
    probed = [record_of(name, None).weights_digest for name in ("poet", "bare")]
    assert publishing.worker.called("probe") == [(digest,) for digest in probed]


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    [outcome] = Publishing()("mute")
    assert isinstance(outcome, AdapterRefused)
    assert outcome.name == "mute"
    assert "does not change" in str(outcome)


@pytest.mark.parametrize("names", [("bad",), ("mute", "wrong"), ()])
def test_nothing_is_committed_when_nothing_is_good(names: tuple[str, ...]) -> None:
    publishing = Publishing()
    assert live(publishing(*names)) == []
    assert publishing.store.called("commit") == []
    assert publishing.retriever.called("catch_up") == []


def test_replicas_that_do_not_catch_up_are_counted_as_behind() -> None:
    late = FakeRetriever(caught_up=StaleIndex(8, 7))
    retriever = FakeHandle(FakeRetriever(), late, FakeRetriever())
    [published] = live(Publishing(retriever)("poet"))
    assert (published.ready, published.behind) == (2, 1)
    assert retriever.called("catch_up") == [(8,)]
    assert retriever.timeouts_s == [CATCH_UP_TIMEOUT_S]


def test_a_replica_that_stays_silent_leaves_the_commit_standing() -> None:
    [published] = live(Publishing(FakeHandle(FakeRetriever(), num_silent=1))("poet"))
    assert published.generation == 8
    assert published.behind >= 1


def test_a_commit_that_fails_is_an_error_of_the_whole() -> None:
    publishing = Publishing(store=FakeStore(failure=VersionConflict(3)))
    with pytest.raises(VersionConflict):
        publishing("poet", "bare")
    assert publishing.retriever.called("catch_up") == []


def test_what_is_live_already_is_neither_probed_nor_committed_again() -> None:
    publishing = Publishing()
    [published] = live(publishing("live-one"))
    assert (published.ref.name, published.generation, published.ready) == ("live-one", 3, 1)
    assert publishing.worker.called("probe") == []
    assert publishing.store.called("commit") == []
    assert publishing.retriever.called("catch_up") == [(3,)]


def test_new_and_live_adapters_are_ready_at_the_new_generation() -> None:
    publishing = Publishing()
    assert [item.generation for item in live(publishing("live-one", "poet"))] == [3, 8]
    assert publishing.retriever.called("catch_up") == [(8,)]
