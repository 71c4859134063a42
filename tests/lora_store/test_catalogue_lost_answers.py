"""Commits that succeed although their answer is lost: each happens once, and its caller learns that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4
from wsgiref.types import WSGIEnvironment

import pyarrow as pa
import pytest

from lora_store import AdapterNotFound, AdapterRecord, Location, LoraStore, Snapshot, StoreUnavailable
from lora_store.catalogue import Catalogue
from lora_store.event_table import EventTable
from lora_store.events import Event
from lora_store.rules import publish_events, withdraw_events
from lora_store.table_log import commit_name
from tests.lora_store.builders import BASE, IN_A_FOLDER, NOON, ON_S3, MakeFolder, MakeRecord, OpenStore, embedding
from tests.s3 import S3Endpoint


class Losing(EventTable):
    """Appends, and loses the answers that the test selects."""

    loses = False
    answer: StoreUnavailable | None = None

    def append(self, rows: pa.Table, version: int) -> bool:
        is_appended = super().append(rows, version)
        if not Losing.loses:
            return is_appended
        Losing.loses = False
        if self.answer is not None:
            raise self.answer
        return False  # as after a CommitFailedError


class LosingByError(Losing):
    answer = StoreUnavailable("the request timed out")


def _publish(record: AdapterRecord) -> Callable[[Snapshot], list[Event]]:
    return lambda snapshot: publish_events(snapshot, [record])


@pytest.mark.parametrize("table", [Losing, LosingByError])
def test_a_commit_that_succeeded_is_not_repeated_and_returns_its_generation(
    location: Location, make_record: MakeRecord, table: type[EventTable]
) -> None:
    for max_attempts, change, generation in (
        (10, _publish(make_record()), 1),
        (10, lambda snap: withdraw_events(snap, [("local", "poet")], "me", NOON), 2),
        (1, _publish(make_record("last")), 3),
    ):
        catalogue = Catalogue(location, max_attempts=max_attempts, open_table=table)
        Losing.loses = True
        assert catalogue.commit(change) == generation
    reopened = Catalogue(location).snapshot()
    assert (reopened.generation, list(reopened.records)) == (3, [("local", "last")])
    assert EventTable(location).refresh()[0].num_rows == 3  # one row each


def test_a_commit_that_did_not_land_is_still_an_error(location: Location, make_record: MakeRecord) -> None:
    class Failing(EventTable):
        def append(self, rows: pa.Table, version: int) -> bool:
            raise StoreUnavailable("the request timed out")

    with pytest.raises(StoreUnavailable):
        Catalogue(location, open_table=Failing).commit(_publish(make_record()))
    assert Catalogue(location).snapshot().generation == 0


def test_a_call_repeated_with_its_id_happens_once(location: Location, make_record: MakeRecord) -> None:
    """The repetition may come from another process, or after a fold."""
    first, second = Catalogue(location, min_tail=2), Catalogue(location)
    commit_id = uuid4().hex
    assert first.commit(_publish(make_record()), commit_id) == 1
    assert second.commit(lambda snap: pytest.fail("asked"), commit_id) == 1
    for number in range(6):
        first.commit(_publish(make_record("other", digest=f"{number:064x}")))
    assert any(name.startswith("fold-") for name in EventTable(location)._data_files())
    assert Catalogue(location).commit(lambda snap: pytest.fail("asked"), commit_id) == 1
    assert first.commit(_publish(make_record("new")), uuid4().hex) == first.snapshot().generation


@IN_A_FOLDER
def test_a_change_of_the_store_repeated_with_its_id_happens_once(
    open_store: OpenStore, make_folder: MakeFolder
) -> None:
    """The repetition may come from another process, which has other leases."""
    first, second = open_store(), open_store()
    staged, published, gone = first.stage(make_folder()), uuid4().hex, uuid4().hex
    for store in (first, second):
        assert store.commit([staged], [embedding()], [1.0], "me", commit_id=published) == 1
    withdrawn = [store.withdraw("local", ["poet"], "me", gone) for store in (first, second)]
    assert [(each.generation, len(each.records)) for each in withdrawn] == [(2, 1), (2, 0)]
    with pytest.raises(AdapterNotFound):
        second.withdraw("local", ["poet"], "me", uuid4().hex)


@contextmanager
def _lost_answers(endpoint: S3Endpoint, version: int, times: int) -> Iterator[list[str]]:
    """Execute the PUT of this version of the log, and answer it with an error, so that a retry finds its own write."""
    lost: list[str] = []

    def loses(environ: WSGIEnvironment) -> bool:
        is_commit = environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(commit_name(version))
        if is_commit and len(lost) < times:
            lost.append(environ["PATH_INFO"])
            return True
        return False

    endpoint.loses_answer = loses
    try:
        yield lost
    finally:
        endpoint.loses_answer = lambda _: False


@pytest.mark.parametrize("times", [1, 3])
def test_an_endpoint_that_loses_answers_to_commits(
    s3_endpoint: S3Endpoint, make_folder: MakeFolder, times: int
) -> None:
    store = LoraStore(s3_endpoint.uri(f"stores/{uuid4().hex}"), accepts_base=[BASE])
    published = store.commit([store.stage(make_folder())], [embedding()], [1.0], "me")
    with _lost_answers(s3_endpoint, 2, times) as lost:
        withdrawn = store.withdraw("local", ["poet"], "me")
    assert len(lost) >= 1
    assert (withdrawn.generation, [record.ref.name for record in withdrawn.records]) == (published + 1, ["poet"])
    with pytest.raises(AdapterNotFound):
        store.withdraw("local", ["poet"], "me")


@ON_S3
@pytest.mark.parametrize("maintain", ["fold", "compact"])
def test_a_fold_or_compaction_whose_answer_is_lost_keeps_the_pool(
    location: Location, s3_endpoint: S3Endpoint, make_record: MakeRecord, maintain: str
) -> None:
    """Its data files are all that the table consists of."""
    catalogue = Catalogue(location)
    for number in range(3):
        catalogue.commit(_publish(make_record(f"a{number}")))
    records = catalogue.snapshot().records
    with _lost_answers(s3_endpoint, 4, times=1) as lost:
        if maintain == "fold":
            catalogue.vacuum(NOON)
        else:
            EventTable(location).compact()
    assert len(lost) == 1
    reopened = Catalogue(location).snapshot()
    assert (reopened.generation, dict(reopened.records)) == (4, dict(records))
