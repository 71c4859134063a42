"""New versions of a live name keep what their publish does not give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_store import AdapterRecord, LoraStore, Sample, Staged, VersionConflict
from lora_store.peft_files import TEMPLATE_FILE
from lora_store.sample_files import DESCRIPTION_FILE
from tests.lora_store.builders import IN_A_FOLDER, FakeClock, MakeFolder, OpenStore, Stored, embedding

pytestmark = IN_A_FOLDER

SAMPLES = ("Write a poem.", "Rhyme this.")
GIVEN: dict[str, Any] = {"tags": ["support"], "template": "alpaca", "visibility": "private"}


@pytest.fixture
def store(open_store: OpenStore) -> LoraStore:
    store = open_store()
    store._read_contract = lambda name, data: (data.decode(), ())
    return store


def commit(store: LoraStore, *staged: Staged) -> AdapterRecord:
    """Commit them and return the live version."""
    store.commit(staged, [embedding() if item.samples else None for item in staged], [1.0] * len(staged), "me")
    return live(store)


def live(store: LoraStore) -> AdapterRecord:
    return store.snapshot().records["local", "poet"]


def label(record: AdapterRecord) -> tuple[tuple[str, ...], str | None, str, int]:
    return record.tags, record.template, record.visibility, record.num_samples


def test_a_new_version_keeps_what_its_publish_does_not_give(store: LoraStore, make_folder: MakeFolder) -> None:
    first = commit(store, store.stage(make_folder(), **GIVEN))
    same = store.stage(make_folder(), keeps_visibility=True)
    assert (same.ref, commit(store, same).generation) == (first.ref, 1)
    second = commit(store, again := store.stage(make_folder(seed=1, inputs=()), keeps_visibility=True))
    assert label(first) == label(second) == (("support",), "alpaca", "private", 2)
    assert (second.samples_digest, second.ref) == (first.samples_digest, again.ref)
    assert [sample.input for sample in again.samples] == list(SAMPLES), "the encoder embeds them again"
    assert second.weights_digest != first.weights_digest
    trial = commit(store, offered := store.stage(make_folder(seed=2), keeps_visibility=True, share=0.1)).trial
    assert trial is not None
    assert (trial.digest, offered.record.template) == (offered.ref.digest, "alpaca")
    store.withdraw("local", ["poet"], "me")
    assert label(commit(store, store.stage(make_folder(seed=1, inputs=())))) == ((), None, "public", 0)


def test_an_empty_contract_clears(store: LoraStore, make_folder: MakeFolder) -> None:
    commit(store, store.stage(make_folder(), contract="a contract"))
    assert commit(store, store.stage(make_folder(seed=1))).contract == "a contract"
    (folder := make_folder(seed=2)).joinpath("adapter_io.yaml").write_text("")
    assert commit(store, store.stage(folder)).contract is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tags": ["sales", "eu"]}, (("eu", "sales"), "alpaca", "private", 2)),
        ({"tags": []}, ((), "alpaca", "private", 2)),
        ({"template": "chat"}, (("support",), "chat", "private", 2)),
        ({"template": "server"}, (("support",), None, "private", 2)),
        ({"keeps_visibility": False, "visibility": "public"}, (("support",), "alpaca", "public", 2)),
        ({"has_samples": False}, (("support",), "alpaca", "private", 0)),
    ],
    ids=str,
)
def test_a_given_field_replaces_or_clears(
    store: LoraStore, make_folder: MakeFolder, given: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    commit(store, store.stage(make_folder(), **GIVEN))
    staged = store.stage(make_folder(seed=1, inputs=()), **{"keeps_visibility": True, **given})
    assert label(commit(store, staged)) == expected


def described(folder: Path, text: str) -> Path:
    (folder / DESCRIPTION_FILE).write_text(text)
    return folder


def test_a_description_replaces_a_description_and_never_several_samples(
    store: LoraStore, make_folder: MakeFolder
) -> None:
    commit(store, store.stage(described(make_folder(inputs=()), "It writes poems.")))
    new = store.stage(described(make_folder(seed=1, inputs=()), "It writes songs."))
    assert new.samples == (Sample("It writes songs."),)
    commit(store, new)
    commit(store, store.stage(make_folder(seed=2)))
    kept = store.stage(described(make_folder(seed=3, inputs=()), "It writes poems."))
    assert [sample.input for sample in kept.samples] == list(SAMPLES)
    assert commit(store, kept).num_samples == 2


def test_a_folders_template_counts_for_a_new_name_only(store: LoraStore, make_folder: MakeFolder) -> None:
    commit(store, store.stage(make_folder(), template="alpaca"))
    folder = make_folder(seed=1)
    (folder / TEMPLATE_FILE).write_text("{{ unknown }}")
    assert commit(store, store.stage(folder, templates={})).template == "alpaca"
    assert commit(store, store.stage(folder, template="server", templates={})).template is None


@pytest.mark.parametrize(
    "given",
    [{"tags": ["new"]}, {"template": "alpaca"}, {"contract": '{"stop":["a"]}'}, {"inputs": ("Other.",)}],
    ids=str,
)
def test_two_publishes_at_once_lose_nothing_of_each_other(
    store: LoraStore, make_folder: MakeFolder, stored: Stored, given: dict[str, Any]
) -> None:
    commit(store, store.stage(make_folder()))
    ours = store.stage(make_folder(seed=1, inputs=()))
    rest = {"inputs": SAMPLES} | given
    theirs = commit(store, store.stage(make_folder(inputs=rest.pop("inputs")), **rest))  # before our commit
    with pytest.raises(VersionConflict):
        commit(store, ours)
    [again] = store.take_over([ours])
    record = commit(store, again)
    assert record.weights_digest == ours.weights_digest
    kept = [(item.tags, item.template, item.contract, item.samples_digest) for item in (record, theirs)]
    assert kept[0] == kept[1]
    assert store.take_over([again]) == [again]
    store.discard([ours])
    assert stored("holds") == {}
    assert [check.problem for check in store.verify() if check.problem] == []


def test_a_version_that_cannot_be_taken_over_leaves_no_lease_of_another(
    store: LoraStore, make_folder: MakeFolder, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = [store.stage(make_folder(name=name, seed=1, inputs=())) for name in ("a", "b")]
    theirs = [store.stage(make_folder(name=name, inputs=(name,))) for name in ("a", "b")]
    store.commit(theirs, [embedding()] * 2, [1.0] * 2, "me")
    take_over, leases = store._take_over, set(stored("holds"))
    monkeypatch.setattr(store, "_take_over", lambda item, live: take_over(item, live if item is ours[0] else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        store.take_over(ours)
    assert set(stored("holds")) == leases


@pytest.mark.parametrize("earlier", [None, "It writes poems."])
def test_a_description_never_replaces_several_samples_of_a_publish_at_the_same_time(
    store: LoraStore, make_folder: MakeFolder, earlier: str | None
) -> None:
    if earlier is not None:
        commit(store, store.stage(described(make_folder(inputs=()), earlier)))
    ours = store.stage(described(make_folder(seed=1, inputs=()), "It writes songs."))
    theirs = commit(store, store.stage(make_folder(seed=2)))
    with pytest.raises(VersionConflict):
        commit(store, ours)
    record = commit(store, *store.take_over([ours]))
    assert (record.samples_digest, record.weights_digest) == (theirs.samples_digest, ours.weights_digest)


def test_a_description_replaces_that_of_a_publish_at_the_same_time(store: LoraStore, make_folder: MakeFolder) -> None:
    ours = store.stage(described(make_folder(seed=1, inputs=()), "It writes songs."))
    commit(store, store.stage(described(make_folder(inputs=()), "It writes poems.")))
    commit(store, ours)
    assert store.samples(live(store).samples_digest or "") == (Sample("It writes songs."),)


def test_warnings_outlast_a_commit_that_another_publish_came_before(store: LoraStore, make_folder: MakeFolder) -> None:
    store._read_contract = lambda name, data: (data.decode(), ("its stop strings are not applied",))
    commit(store, store.stage(make_folder()))
    ours = store.stage(make_folder(seed=1, inputs=()), contract="a contract")
    assert ours.warnings
    commit(store, store.stage(make_folder(seed=2, inputs=("Other.",))))
    [again] = store.take_over([ours])
    assert (again.record.num_samples, again.warnings) == (1, ours.warnings)


def test_a_rivals_first_version_of_a_new_name_is_taken_over(store: LoraStore, make_folder: MakeFolder) -> None:
    ours = store.stage(make_folder(seed=1))
    commit(store, store.stage(make_folder(), **GIVEN))
    with pytest.raises(VersionConflict):
        commit(store, ours)
    assert commit(store, *store.take_over([ours])).tags == ("support",)


def test_a_rollback_keeps_the_time_and_the_label(store: LoraStore, make_folder: MakeFolder, clock: FakeClock) -> None:
    first = commit(store, store.stage(make_folder(), tags=["old"], template="alpaca"))
    published_at = clock.at
    clock.sleep(60)
    commit(store, store.stage(make_folder(seed=1), tags=["new"], template="chat"))
    clock.sleep(60)
    store.commit([store.restage(first)], [embedding()], [1.0], "me", "kept")
    assert (live(store).ref, live(store).tags, live(store).template) == (first.ref, ("old",), "alpaca")
    rolled_back_at = clock.at
    clock.sleep(60)
    store.commit([store.restage(live(store))], [embedding(encoder="another")], [1.0], "me", "live")
    assert live(store).ref == first.ref
    assert (live(store).created_at, live(store).live_since) == (published_at, rolled_back_at)
    assert first.live_since is None
