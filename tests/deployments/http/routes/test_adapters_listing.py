"""Lists and single adapters, as a client reads them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from lora_store import Sample
from tests.deployments.adapter_records import adapter
from tests.deployments.asking import asked, error_of, get
from tests.deployments.fake_retriever import FakeRetriever


def test_the_pool_is_listed_with_its_generation() -> None:
    listed = get("/v1/loras").json()
    assert listed["generation"] == 7
    assert [row["name"] for row in listed["data"]] == ["coder", "poet"]
    assert "embedding" not in listed["data"][0]


@pytest.mark.parametrize("search", ["", "task-1 even"])
@pytest.mark.parametrize("limit", [1, 7, 24, 25, 26])
async def test_the_pool_is_paged_as_the_models_are(limit: int, search: str) -> None:
    held = [adapter(f"task-{number:02}", version="even" if number % 2 == 0 else "odd") for number in range(25)]
    expected = [
        record.ref.name
        for record in held
        if not search or record.ref.name in ("task-10", "task-12", "task-14", "task-16", "task-18")
    ]
    async with asked(retriever=FakeRetriever(held)) as (client, _):
        seen: list[str] = []
        has_more = True
        while has_more:
            query = {"limit": limit, "search": search, "after": seen[-1] if seen else ""}
            page = (await client.get("/v1/loras", params=query)).json()
            assert page["total"] == len(expected)
            assert len(page["data"]) == limit or not page["has_more"]
            seen += [row["id"] for row in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], seen[-1])
            has_more = page["has_more"]
    assert seen == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [("sort=newest", ["poet", "coder"]), ("base=tiny-base", ["coder", "poet"]), ("base=other", [])],
)
def test_the_pool_is_filtered_by_base_and_sorted_by_age(query: str, expected: list[str]) -> None:
    held = [replace(adapter("poet"), created_at=datetime(2026, 1, 9, tzinfo=UTC)), adapter("coder")]
    assert [row["id"] for row in get(f"/v1/loras?{query}", retriever=FakeRetriever(held)).json()["data"]] == expected


@pytest.mark.parametrize(("query", "param"), [("limit=0", "limit"), ("limit=1001", "limit"), ("sort=size", "sort")])
def test_a_page_of_the_pool_is_bounded(query: str, param: str) -> None:
    response = get(f"/v1/loras?{query}")
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize("name", ["poet", "local/poet"])
def test_one_adapter_is_shown_with_its_kept_versions(name: str) -> None:
    shown = get(f"/v1/loras/{name}").json()
    assert (shown["name"], shown["digest"]) == ("poet", adapter("poet").ref.digest)
    assert shown["weights_digest"] == adapter("poet").weights_digest
    assert [(row["digest"], row["state"]) for row in shown["versions"]] == [
        (adapter("poet").ref.digest, "live"),
        (adapter("poet", version="older").ref.digest, "kept"),
    ]


def test_samples_are_not_older_than_the_version_that_is_shown_with_them() -> None:
    """An editor that names this version's digest would otherwise replace newer samples by older ones."""

    class Behind(FakeRetriever):
        async def samples(self, tenant: str, name: str, min_generation: int = 0) -> list[Sample]:
            return [Sample("new" if min_generation == 7 else "old")]

    shown = get("/v1/loras/poet?samples=1", retriever=Behind()).json()
    assert (shown["catalogue_generation"], shown["samples"]) == (7, [{"input": "new", "output": None}])


def test_samples_are_shown_as_many_as_asked_for() -> None:
    first = {"input": "A sample of poet.", "output": None}
    second = {"input": "Another one.", "output": "Its output."}
    assert get("/v1/loras/poet?samples=1").json()["samples"] == [first]
    assert get("/v1/loras/poet?samples=200").json()["samples"] == [first, second]
    assert get("/v1/loras/poet").json()["samples"] == []
    response = get("/v1/loras/poet?samples=201")
    assert (response.status_code, error_of(response)["param"]) == (400, "samples")


def test_samples_that_differ_most_are_shown_if_asked_for() -> None:
    class Reworded(FakeRetriever):
        async def samples(self, tenant: str, name: str, min_generation: int = 0) -> list[Sample]:
            return [Sample("Negate: a cat sleeps"), Sample("Negate: a dog sleeps"), Sample("say not for me", "No.")]

    shown = get("/v1/loras/poet?samples=2&varied=true", retriever=Reworded()).json()["samples"]
    assert shown == [{"input": "Negate: a cat sleeps", "output": None}, {"input": "say not for me", "output": "No."}]
    first = get("/v1/loras/poet?samples=2", retriever=Reworded()).json()["samples"]
    assert [sample["input"] for sample in first] == ["Negate: a cat sleeps", "Negate: a dog sleeps"]
