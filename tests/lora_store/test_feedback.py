from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lora_store import Location
from lora_store.feedback import KEPT_FOR, MAX_KEPT, MAX_PER_KEY, Feedback, FeedbackFiles, Kind
from lora_store.files import Files

NOW = datetime.now(UTC)


@pytest.fixture
def files(folder_uri: str) -> FeedbackFiles:
    """In a folder, where two writes have two times."""
    return FeedbackFiles(Location(folder_uri).child("feedback"))


def propose(files: FeedbackFiles, text: str, key: str = "k", *, adapter: str = "poet", tenant: str = "acme") -> None:
    files.put(tenant, "proposed", Feedback.proposed(text, adapter, key), NOW)


def texts(files: FeedbackFiles, adapter: str = "poet", tenant: str = "acme") -> list[str]:
    return [given.text for given in files.all(tenant, "proposed", adapter)]


def test_feedback_survives_the_process_and_is_kept_apart_by_tenant_and_adapter(store_uri: str) -> None:
    location = Location(store_uri).child("feedback")
    propose(FeedbackFiles(location), "Ein Gedicht, bitte. ✓")
    other = FeedbackFiles(location)
    [found] = other.all("acme", "proposed", "poet")
    assert (found.text, found.adapter, found.key_id) == ("Ein Gedicht, bitte. ✓", "poet", "k")
    assert texts(other, "coder") == texts(other, tenant="globex") == []


def test_a_key_keeps_its_newest_proposals_and_pushes_out_no_other_key(files: FeedbackFiles) -> None:
    propose(files, "of another key", "other")
    for number in range(MAX_PER_KEY + 2):
        propose(files, f"text {number}")
    assert texts(files) == ["text 4", "text 3", "text 2", "of another key"]


def reject(files: FeedbackFiles, text: str) -> None:
    files.put("acme", "proposed", replace(Feedback.proposed(text, "poet", "k"), text=""), NOW)


def test_a_rejected_proposal_returns_only_after_newer_rejected_ones_of_its_key(files: FeedbackFiles) -> None:
    reject(files, "Rhyme.")
    for number in range(MAX_PER_KEY):
        propose(files, "Rhyme.")
        assert "Rhyme." not in texts(files)
        reject(files, f"text {number}")
    propose(files, "Rhyme.")
    assert "Rhyme." in texts(files)


def test_a_rejection_pushes_out_no_proposal_that_waits(files: FeedbackFiles) -> None:
    for text in ("one", "two", "three"):
        propose(files, text)
    reject(files, "one")
    propose(files, "four")
    assert texts(files) == ["four", "three", "two"]


def test_the_same_text_of_a_key_counts_once_and_does_not_return_after_a_rejection(files: FeedbackFiles) -> None:
    propose(files, "Rhyme.")
    propose(files, "Rhyme.")
    [proposal] = files.all("acme", "proposed", "poet")
    files.put("acme", "proposed", Feedback(proposal.id, "", "poet", "k"), NOW)
    assert texts(files) == []
    propose(files, "Rhyme.")
    assert texts(files) == []
    propose(files, "Rhyme.", "another key")
    assert texts(files) == ["Rhyme."]


@pytest.mark.parametrize(("kind", "adapter"), [("proposed", "poet"), ("outcome", None)])
def test_each_folder_is_bounded(
    files: FeedbackFiles, monkeypatch: pytest.MonkeyPatch, kind: Kind, adapter: str | None
) -> None:
    monkeypatch.setitem(MAX_KEPT, kind, 4)
    for number in range(7):
        given: dict[str, Any] = {"text": f"text {number}", "adapter": adapter, "key_id": f"key {number}"}
        files.put("acme", kind, Feedback(f"{number}-{number}", **given), NOW)
    assert [given.text for given in files.all("acme", kind, adapter)] == [f"text {n}" for n in (6, 5, 4, 3)]


def test_asked_prompts_are_found_by_their_request_and_bounded(
    files: FeedbackFiles, monkeypatch: pytest.MonkeyPatch, folder_uri: str
) -> None:
    monkeypatch.setitem(MAX_KEPT, "asked", 10)
    for number in range(120):
        files.put("acme", "asked", Feedback.of_request(f"id {number}", f"text {number}", None, "k"), NOW)
    found = files.get("acme", "asked", "id 119")
    assert found is not None and found.text == "text 119"
    assert files.get("globex", "asked", "id 119") is None, "of another tenant"
    assert files.get("acme", "asked", "id 3") is None, "dropped"
    num_kept = len(os.listdir(Path(Location(folder_uri).filesystem_path, "feedback", "asked", "acme")))
    assert num_kept <= 10 + 50


def test_a_later_outcome_of_a_request_replaces_the_earlier_one(files: FeedbackFiles) -> None:
    for score in (1.0, -0.5):
        files.put("acme", "outcome", Feedback.of_request("id", "text", "poet", "k", score), NOW)
    assert [given.score for given in files.all("acme", "outcome")] == [-0.5]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]"])
def test_a_broken_file_hides_no_other(folder_uri: str, content: bytes) -> None:
    location = Location(folder_uri).child("feedback")
    files = FeedbackFiles(location)
    for id in ("one", "two"):
        files.put("acme", "outcome", Feedback.of_request(id, f"text {id}", "poet", "k", 1), NOW)
    Files(location).write(f"outcome/acme/{Feedback.of_request('one', '', None, '').id}", content)
    assert [given.text for given in files.all("acme", "outcome")] == ["text two"]
    assert files.get("acme", "outcome", "one") is None


@pytest.mark.parametrize("kind", list(KEPT_FOR))
def test_old_feedback_is_deleted_and_young_is_kept(files: FeedbackFiles, kind: Kind) -> None:
    adapter = "poet" if kind == "proposed" else None
    files.put("acme", kind, Feedback("a-b", "text", adapter, "k"), NOW)
    files.delete_old(NOW + KEPT_FOR[kind] - timedelta(hours=1))
    assert len(files.all("acme", kind, adapter)) == 1
    files.delete_old(NOW + KEPT_FOR[kind] + timedelta(hours=1))
    assert files.all("acme", kind, adapter) == []


def test_a_prompt_is_deleted_in_time_although_its_tenant_sends_no_more(files: FeedbackFiles) -> None:
    files.put("quiet", "asked", Feedback.of_request("id", "text", None, "k"), NOW)
    files.put("acme", "asked", Feedback.of_request("id", "text", None, "k"), NOW + timedelta(hours=22))
    assert files.get("quiet", "asked", "id") is not None, "it is not a day old"
    files.put("acme", "asked", Feedback.of_request("id", "text", None, "k"), NOW + timedelta(hours=26))
    assert files.get("quiet", "asked", "id") is None


def test_chosen_proposals_are_deleted_and_the_others_stay(files: FeedbackFiles) -> None:
    for text in ("one", "two"):
        propose(files, text)
    propose(files, "one", adapter="coder")
    files.delete("acme", "poet", [Feedback.proposed("one", "poet", "k").id])
    assert (texts(files), texts(files, "coder")) == (["two"], ["one"])
    files.delete("acme", "poet")
    assert (texts(files), texts(files, "coder")) == ([], ["one"])
