from __future__ import annotations

from collections.abc import Callable

import pytest

from lora_store import AdapterRefused, Location, LoraStore
from lora_store.files import Files
from tests.bad_uploads import BAD_FOLDERS, BAD_LABELS
from tests.lora_store.builders import BASE, MakeFolder


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """Return the location of one store for all of them: none may leave files in it."""
    return Location(str(tmp_path_factory.mktemp("refusing") / "store"))


@pytest.fixture(scope="module")
def store(location: Location) -> LoraStore:
    return LoraStore(location.uri, accepts_base=[BASE])


@pytest.fixture
def everything(location: Location) -> Callable[[], list[tuple[str, int]]]:
    """Return all files of the store but its reserve."""
    return lambda: sorted(
        (file.name, file.num_bytes) for file in Files(location).entries() if not file.name.startswith("ballast/")
    )


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_refused_by_name_and_nothing_is_stored(
    store: LoraStore,
    everything: Callable[[], list[tuple[str, int]]],
    make_folder: MakeFolder,
    module_shapes: dict[str, tuple[int, int]],
    kind: str,
) -> None:
    (spoil, cause), folder, before = BAD_FOLDERS[kind], make_folder(), everything()
    spoil(folder)
    with pytest.raises(AdapterRefused) as caught:
        store.stage(folder, module_shapes=module_shapes)
    assert any(cause in reason for reason in caught.value.reasons), caught.value.reasons
    assert cause in str(caught.value)
    assert everything() == before
    assert store.snapshot().generation == 0


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_a_bad_label_is_refused_by_name_and_nothing_is_stored(
    store: LoraStore, everything: Callable[[], list[tuple[str, int]]], make_folder: MakeFolder, kind: str
) -> None:
    (label, cause), before = BAD_LABELS[kind], everything()
    with pytest.raises(AdapterRefused) as caught:
        store.stage(make_folder(), **label)
    [given] = caught.value.reasons
    assert given.startswith(cause)
    assert given.isprintable() and str(caught.value).isprintable()
    assert everything() == before
    assert store.snapshot().generation == 0


def test_the_undamaged_folder_is_valid(
    store: LoraStore, make_folder: MakeFolder, module_shapes: dict[str, tuple[int, int]]
) -> None:
    staged = store.stage(make_folder(), module_shapes=module_shapes)
    assert staged.samples
    store.discard([staged])
