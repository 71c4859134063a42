"""Files of the catalogue are broken as a power failure leaves them, and the catalogue is repaired."""

from __future__ import annotations

import random
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from lora_store import Location, Snapshot
from lora_store.catalogue import CATALOGUE, Catalogue
from lora_store.errors import StoreDamaged
from lora_store.event_table import EventTable
from lora_store.events import SCHEMA, Publish, Withdraw, make_fold_table, make_table
from lora_store.files import Files
from lora_store.repair import Repaired, repair
from lora_store.table_log import LAST_CHECKPOINT, LOG, checkpoint_name, commit_name
from tests.lora_store.builders import IN_A_FOLDER, LATER, NOON, MakeRecord

Fill = Callable[..., Catalogue]


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "cut late": lambda data: data[:-10],
    "zeros": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
}
MISSING = "missing"


@pytest.fixture
def table(location: Location) -> Location:
    return location.child("catalogue")


@pytest.fixture
def fill(table: Location, make_record: MakeRecord) -> Fill:
    """Return a function that publishes a0, a1, ... in one commit each."""

    def publish(number: int, start: int = 0, min_tail: int = 4096) -> Catalogue:
        catalogue = Catalogue(table, min_tail=min_tail)
        for count in range(start, start + number):
            catalogue.commit(lambda _, count=count: [Publish(make_record(f"a{count}", digest=f"{count:064x}"))])
        return catalogue

    return publish


def _break(table: Location, name: str, how: str) -> None:
    """Change the bytes of a file, or delete it."""
    files = Files(table)
    data = files.read(name)
    assert data is not None
    if how == MISSING:
        files.delete([name])
    else:
        files.write(name, BREAKS[how](data))


def _data_file(table: Location, generation: int) -> str:
    """Return the data file of the publish of that generation."""
    opened = EventTable(table)
    for name in sorted(opened._data_files()):
        rows = opened._read_rows(opened._contents([name]))
        if rows["generation"].to_pylist() == [generation]:
            return name
    raise AssertionError(f"no file of generation {generation}")


def _names(snapshot: Snapshot) -> list[str]:
    return sorted(name for _, name in snapshot.records)


def _repaired(location: Location) -> Repaired:
    done = repair(location, NOON)
    assert done is not None
    return done


@pytest.mark.parametrize(
    ("store_uri", "how"), [*(("folder", how) for how in BREAKS), ("s3", "cut")], indirect=["store_uri"]
)
def test_a_publish_with_a_broken_commit_is_restored(location: Location, table: Location, fill: Fill, how: str) -> None:
    """Its rows are whole in its data file."""
    before = fill(4).snapshot()
    _break(table, commit_name(4), how)
    with pytest.raises(StoreDamaged, match=commit_name(4)):
        Catalogue(table)
    done = _repaired(location)
    assert (done.lost, done.generation, done.num_adapters) == ((), 5, 4)
    assert Catalogue(table).snapshot().records == before.records
    assert Files(Location(done.aside)).contains(commit_name(4))
    whole = {file.name: file.written_at for file in Files(location).entries()}
    assert repair(location, NOON) is None
    assert {file.name: file.written_at for file in Files(location).entries()} == whole, "it is not touched"


@IN_A_FOLDER
@pytest.mark.parametrize("how", [*BREAKS, MISSING])
def test_a_broken_data_file_costs_its_publish_only(location: Location, table: Location, fill: Fill, how: str) -> None:
    fill(4)
    file = _data_file(table, 3)
    _break(table, file, how)
    with pytest.raises(StoreDamaged, match=file):
        Catalogue(table)
    done = _repaired(location)
    assert _names(Catalogue(table).snapshot()) == ["a0", "a1", "a3"]
    assert len(done.lost) == 1 and "generation 3" in done.lost[0] and file in done.lost[0]
    assert list(done.damaged) == [file]
    assert not done.aside if how == MISSING else Files(Location(done.aside)).contains(file)
    assert not Files(table).contains(file)


@IN_A_FOLDER
def test_a_replica_that_follows_reports_an_empty_commit_again_and_again(table: Location, fill: Fill) -> None:
    reader = fill(1)
    Files(table).write(commit_name(2), b"")
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=f"{commit_name(2)} is empty"):
            reader.snapshot()


def test_the_pool_goes_on_above_every_generation_after_a_repair(
    location: Location, table: Location, fill: Fill, make_record: MakeRecord
) -> None:
    fill(4)
    _break(table, commit_name(4), "empty")
    _repaired(location)
    catalogue = fill(8, start=4, min_tail=5)
    assert catalogue.snapshot().generation > 12
    catalogue.commit(lambda snap: [Withdraw(snap.records["local", "a0"].ref, "me", NOON)])
    catalogue.vacuum(LATER)
    assert _names(Catalogue(table).snapshot()) == sorted(f"a{number}" for number in range(1, 12))
    assert repair(location, NOON) is None


def test_a_lost_log_is_made_again_from_the_data_files(location: Location, table: Location, fill: Fill) -> None:
    before = fill(6, min_tail=3).snapshot()
    _lose_log(table)
    done = _repaired(location)
    assert Catalogue(table).snapshot().records == before.records
    assert done.generation > before.generation - 1 and done.lost != ()
    Catalogue(table).vacuum(LATER)
    assert Catalogue(table).snapshot().records == before.records


def test_without_any_data_file_there_is_nothing_to_repair_from(location: Location, table: Location) -> None:
    with pytest.raises(ValueError, match="there is no pool"):
        repair(location, NOON)
    assert Files(location).entries() == []
    Files(location).write("blobs/aa/aaa", b"weights")
    with pytest.raises(StoreDamaged, match="no data file is left"):
        repair(location, NOON)
    assert Files(location).entries(CATALOGUE) == []


@IN_A_FOLDER
@pytest.mark.parametrize("how", ["cut", "empty", MISSING])
@pytest.mark.parametrize("name", [checkpoint_name, lambda version: LAST_CHECKPOINT], ids=["checkpoint", "hint"])
def test_a_broken_checkpoint_costs_nothing_while_its_commits_are_there(
    location: Location, table: Location, fill: Fill, name: Callable[[int], str], how: str
) -> None:
    catalogue = fill(3)
    EventTable(table).compact()  # writes a checkpoint
    before = catalogue.snapshot()
    _break(table, name(before.generation), how)
    done = repair(location, NOON)
    assert done is None or done.lost == ()
    assert Catalogue(table).snapshot().records == before.records


@pytest.mark.parametrize(("store_uri", "num_parts"), [("folder", 1), ("folder", 2), ("s3", 2)], indirect=["store_uri"])
def test_a_broken_fold_costs_nothing_while_the_files_that_it_replaced_are_there(
    location: Location, table: Location, fill: Fill, num_parts: int
) -> None:
    before = fill(7, min_tail=2 if num_parts == 1 else 4096).snapshot()
    if num_parts == 2:
        _fold(table, _parts_of_today, before)
    folds = [name for name in EventTable(table)._data_files() if name.startswith("fold-")]
    assert len(folds) == num_parts
    _break(table, folds[0], "cut")
    done = _repaired(location)
    assert done.lost == ()
    assert Catalogue(table).snapshot().records == before.records


@IN_A_FOLDER
def test_a_broken_fold_without_them_is_reported(location: Location, table: Location, fill: Fill) -> None:
    catalogue = fill(5, min_tail=2)
    catalogue.vacuum(LATER)
    (fold,) = EventTable(table)._data_files()
    fill(1, start=5)
    _break(table, fold, "cut")
    done = _repaired(location)
    assert len(done.lost) == 1 and fold in done.lost[0]
    assert _names(Catalogue(table).snapshot()) == ["a5"]


PART_ROWS = 4
Parts = tuple[pa.Table, pa.Table]


def _parts_of_today(snapshot: Snapshot, commits: dict[str, int]) -> Parts:
    events = list(snapshot.folded())
    first = make_fold_table(events, snapshot.generation, commits, slice(0, PART_ROWS))
    return first, make_fold_table(events, snapshot.generation, {}, slice(PART_ROWS, None))


def _older_parts(snapshot: Snapshot, commits: dict[str, int]) -> Parts:
    """Return parts that have the same row numbers for commits and adapters, and do not say how many rows there are."""
    events = list(snapshot.folded())
    first = make_fold_table(events[:PART_ROWS], snapshot.generation, commits)
    numbers = pc.if_else(pc.equal(first["event"], "fold"), None, first["num_samples"])
    first = first.set_column(SCHEMA.get_field_index("num_samples"), SCHEMA.field("num_samples"), numbers)
    return first, make_fold_table(events, snapshot.generation, {}).slice(PART_ROWS)


FOLDS = pytest.mark.parametrize("make_parts", [_parts_of_today, _older_parts])
MakeParts = Callable[[Snapshot, dict[str, int]], Parts]


@pytest.fixture
def part_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each data file of a fold, except the last, have the rows of this many events."""
    monkeypatch.setattr("lora_store.events.FOLD_PART_ROWS", PART_ROWS)


def _fold(table: Location, make_parts: MakeParts, snapshot: Snapshot) -> list[str]:
    """Replace all events by a fold of two data files. Return the files that it replaced."""
    replaced = EventTable(table)._data_files()
    parts = make_parts(snapshot, {f"commit {number}": number for number in range(1, 8)})
    EventTable(table).fold(parts, snapshot.generation, replaced)
    return sorted(replaced)


@FOLDS
@IN_A_FOLDER
def test_a_fold_of_two_files_is_whole_without_a_log(
    location: Location, table: Location, fill: Fill, part_rows: None, make_parts: MakeParts
) -> None:
    before = fill(7).snapshot()
    Files(table).delete(_fold(table, make_parts, before))
    _lose_log(table)
    done = _repaired(location)
    assert len(done.lost) == 1 and "the log" in done.lost[0]
    repaired = Catalogue(table)
    assert repaired.snapshot().records == before.records
    for number in range(1, 8):
        assert repaired.commit(lambda _: pytest.fail("asked"), f"commit {number}") == number


@FOLDS
@IN_A_FOLDER
def test_without_a_log_a_fold_that_a_crash_interrupted_does_not_count(
    location: Location, table: Location, fill: Fill, part_rows: None, make_parts: MakeParts
) -> None:
    before = fill(7).snapshot()
    EventTable(table)._write(make_parts(before, {})[0], f"fold-{before.generation:020}", is_change=False)
    after = fill(1, start=7).snapshot()
    _lose_log(table)
    done = _repaired(location)
    assert len(done.lost) == 1 and "the log" in done.lost[0]
    assert Catalogue(table).snapshot().records == after.records


@FOLDS
@IN_A_FOLDER
def test_a_part_of_a_fold_counts_where_no_other_file_has_its_adapters(
    location: Location, table: Location, fill: Fill, part_rows: None, make_parts: MakeParts
) -> None:
    before = fill(7).snapshot()
    replaced = _fold(table, make_parts, before)
    last = next(name for name in EventTable(table)._data_files() if "a6" in _names_in(table, name))
    left = {name for _, name in before.records} - set(_names_in(table, last))
    Files(table).delete([*replaced, last])
    _lose_log(table)
    done = _repaired(location)
    assert set(_names(Catalogue(table).snapshot())) == left
    assert len(done.lost) == 2 and "generation 7 and older" in done.lost[0]


def _names_in(table: Location, file: str) -> list[str]:
    """Return the names of the adapters in a data file."""
    opened = EventTable(table)
    return [name for name in opened._read_rows(opened._contents([file]))["name"].to_pylist() if name]


@IN_A_FOLDER
def test_rows_of_a_writer_whom_a_rival_preceded_are_not_restored(
    location: Location, table: Location, fill: Fill, make_record: MakeRecord
) -> None:
    fill(2)
    loser = make_table([Publish(make_record("loser"))], 2, "loser")
    EventTable(table)._write(loser, "part", is_change=True)
    repeated = make_table([Publish(make_record("a0", digest=f"{0:064x}"))], 3, _commit_of(table, 1))
    EventTable(table)._write(repeated, "part", is_change=True)
    fill(1, start=2)
    _break(table, commit_name(3), "empty")
    _repaired(location)
    assert _names(Catalogue(table).snapshot()) == ["a0", "a1", "a2"]


@IN_A_FOLDER
def test_without_a_log_a_commit_counts_only_at_its_last_try(
    location: Location, table: Location, fill: Fill, make_record: MakeRecord
) -> None:
    """A writer whom a rival preceded leaves a data file that is older than the rival's."""
    fill(2)
    late = Publish(make_record("late"))
    EventTable(table)._write(make_table([late], 3, "late"), "part", is_change=True)
    fill(1, start=2)
    assert Catalogue(table).commit(lambda _: [late], "late") == 4
    _lose_log(table)
    _repaired(location)
    assert _names(Catalogue(table).snapshot()) == ["a0", "a1", "a2", "late"]


def _lose_log(table: Location) -> None:
    files = Files(table)
    files.delete([file.name for file in files.entries() if file.name.startswith(LOG)])


def _commit_of(table: Location, generation: int) -> str:
    rows = EventTable(table).refresh()[0].to_pylist()
    return next(row["commit_id"] for row in rows if row["generation"] == generation)


@IN_A_FOLDER
@pytest.mark.parametrize("seed", range(4))
def test_any_broken_file_costs_no_whole_publish(location: Location, table: Location, fill: Fill, seed: int) -> None:
    """A file of the log or a data file, after folds and compactions."""
    draw = random.Random(seed)
    catalogue = fill(9, min_tail=draw.choice([3, 4096]))
    if draw.random() < 0.5:
        EventTable(table).compact()
    fill(2, start=9)
    names = _names(catalogue.snapshot())
    broken = draw.choice([file.name for file in Files(table).entries()])
    _break(table, broken, draw.choice(list(BREAKS)))
    done = repair(location, NOON)
    left = _names(Catalogue(table).snapshot())
    assert set(left) <= set(names)
    if done is None or not done.lost:
        assert left == names
    fill(1, start=11)
    assert "a11" in _names(Catalogue(table).snapshot())
