"""After a power failure a store in a folder has everything that was acknowledged, without a repair."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from lora_store import Location, LoraStore
from lora_store.catalogue import Catalogue
from lora_store.events import Publish
from lora_store.files import flush_to_disk
from tests.lora_store.builders import BASE, LATER, MakeFolder, MakeRecord
from tests.lora_store.power_failure import Disk
from tests.lora_store.publishing import publish


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, folder_uri: str) -> Disk:
    return Disk(monkeypatch, Path(folder_uri))


@pytest.fixture(params=[True, False], ids=["names-stay", "names-go"])
def surviving(request: pytest.FixtureRequest, disk: Disk, tmp_path: Path) -> Callable[[], str]:
    """Return a function that returns the URI of what a power failure would leave now."""
    return lambda: str(disk.after_power_failure(tmp_path / uuid4().hex, keeps_names=request.param))


def test_an_acknowledged_publish_is_on_the_disk(
    folder_uri: str, surviving: Callable[[], str], make_folder: MakeFolder
) -> None:
    store = LoraStore(folder_uri, accepts_base=[BASE])
    for number, name in enumerate(["poet", "coder"]):
        done = publish(store, make_folder(name, number), name)
        left = LoraStore(surviving(), accepts_base=[BASE])
        assert left.snapshot().generation == done.generation
        assert left.snapshot().records == store.snapshot().records
        assert {check.problem for check in left.verify()} == {None}
    gone = store.withdraw("local", ["poet"], "me")
    left = LoraStore(surviving(), accepts_base=[BASE])
    assert (left.snapshot().generation, list(left.snapshot().records)) == (gone.generation, [("local", "coder")])


def test_a_publish_into_a_pool_of_an_earlier_release_is_on_the_disk(
    folder_uri: str, disk: Disk, surviving: Callable[[], str], make_folder: MakeFolder
) -> None:
    shutil.copytree(Path(__file__).with_name("pools") / "0.1.0", folder_uri, dirs_exist_ok=True)
    for path in [*Path(folder_uri).rglob("*"), Path(folder_uri)]:
        flush_to_disk(path)
    store = LoraStore(folder_uri, accepts_base=[BASE])
    done = publish(store, make_folder("fresh", 7), "fresh")
    left = LoraStore(surviving(), accepts_base=[BASE])
    assert left.snapshot().generation == done.generation
    assert left.snapshot().records == store.snapshot().records


def test_a_blob_that_another_publish_wrote_is_on_the_disk(
    folder_uri: str, disk: Disk, tmp_path: Path, make_folder: MakeFolder
) -> None:
    """Its writer may not have flushed its folder yet."""
    store = LoraStore(folder_uri, accepts_base=[BASE])
    folder = make_folder()
    staged = store.stage(folder)
    blobs = Path(folder_uri, "blobs")
    for digest in staged.record.blobs:  # as if just written, without a flush
        file = blobs / digest[:2] / digest
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    publish(store, folder, "poet")
    left = LoraStore(str(disk.after_power_failure(tmp_path / "left", keeps_names=False)), accepts_base=[BASE])
    assert {check.problem for check in left.verify()} == {None}


def test_the_pool_opens_after_a_power_failure_at_any_flush(
    folder_uri: str, disk: Disk, surviving: Callable[[], str], make_record: MakeRecord
) -> None:
    """While it is changed, folded, compacted and cleaned."""
    catalogue = Catalogue(Location(folder_uri), min_tail=4)
    acknowledged = 0
    seen: list[int] = []

    def check() -> None:
        disk.on_flush = lambda: None  # the copy is not watched
        left = Catalogue(Location(surviving())).snapshot()
        disk.on_flush = check
        assert left.generation >= acknowledged
        assert set(wanted) <= set(left.records)
        seen.append(left.generation)

    wanted = catalogue.snapshot().records
    disk.on_flush = check
    for number in range(7):
        record = make_record(f"a{number}")
        acknowledged = catalogue.commit(lambda _, record=record: [Publish(record)])
        wanted = catalogue.snapshot().records
    catalogue.vacuum(LATER)
    disk.on_flush = lambda: None
    assert Catalogue(Location(surviving())).snapshot().records == wanted
    assert len(seen) > 40
    assert any(file.name.startswith("fold-") for file in Path(folder_uri).iterdir())
