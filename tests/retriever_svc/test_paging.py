from __future__ import annotations

import pytest

from retriever_svc.paging import page_of
from tests.retriever_svc.pool_fakes import record_of, snapshot_of

EAST = (1.0, 0.0)
SNAPSHOT = snapshot_of(
    record_of("Poet", EAST, tags=("verse", "Rhyme")),
    record_of("coder", None, tags=("python",)),
    record_of("poet-2", EAST),
    record_of("secret-poet", EAST, tenant="them", visibility="private"),
)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", ["Poet", "coder", "poet-2"]),
        ("  ", ["Poet", "coder", "poet-2"]),
        ("POET", ["Poet", "poet-2"]),
        ("rhyme", ["Poet"]),
        ("poet verse", ["Poet"]),
        ("poet python", []),
        ("secret", []),
    ],
)
def test_every_word_stands_in_the_name_or_a_tag(words: str, found: list[str]) -> None:
    page = page_of(SNAPSHOT, "local", words, 0, 10)
    assert [record.ref.name for record in page.records] == found
    assert page.num_found == len(found)


def test_pages_follow_each_other_and_end() -> None:
    pages = [page_of(SNAPSHOT, "local", "", start, 2) for start in (0, 2, 4)]
    assert [[record.ref.name for record in page.records] for page in pages] == [["Poet", "coder"], ["poet-2"], []]
    assert {page.num_found for page in pages} == {3}


def test_embeddings_stay_where_they_are() -> None:
    assert all(record.embedding is None for record in page_of(SNAPSHOT, "local", "", 0, 10).records)


def test_an_owner_finds_what_is_private() -> None:
    assert [record.ref.name for record in page_of(SNAPSHOT, "them", "secret", 0, 10).records] == ["secret-poet"]
