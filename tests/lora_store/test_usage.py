"""Sums of usage events equal a slow count, whatever arrived twice, was torn, or is merged meanwhile."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_store import Location, usage
from lora_store.files import Files
from lora_store.usage import SUMS, Dimension, UsageFiles, UsageQuery, parse_events

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)
TODAY = NOON.date()
KEPT = timedelta(400)
_TOKENS = {"prompt_tokens": 5, "cached_tokens": 2, "completion_tokens": 3}


def event(tenant: str = "acme", adapters: Collection[str] = (), at: datetime = NOON, **changes: Any) -> dict[str, Any]:
    used = [{"name": name, "digest": f"of-{name}", "weight": 1 / len(adapters)} for name in adapters]
    plain = {"request_id": "r", "tenant": tenant, "key": f"{tenant}-1", "route": "/v1/completions", "model": "auto"}
    rest = {"base": "tiny", "adapters": used, "status": 200, "code": "", "queued_s": 0.1, "first_token_s": None}
    return {"time": int(at.timestamp() * 1000), **plain, **rest, **_TOKENS, "total_s": 0.5, **changes}


def lines(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in events)


@pytest.fixture
def stored(folder_uri: str) -> Files:
    return Files(Location(folder_uri).child("usage"))


@pytest.fixture
def files(folder_uri: str) -> UsageFiles:
    return UsageFiles(Location(folder_uri).child("usage"))


def rewrite(stored: Files, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    stored.write(name, sink.getvalue().to_pybytes())


def counts(files: UsageFiles, *by: Dimension, tenant: str | None = None, days: int = 0) -> dict[Any, list[int]]:
    rows = files.sums(UsageQuery(TODAY - timedelta(days), TODAY, by, tenant))
    return {tuple(row[name] for name in by): [row[name] for name in SUMS] for row in rows}


def test_sums_are_by_group_and_a_request_counts_for_each_of_its_adapters(files: UsageFiles) -> None:
    yesterday = NOON - timedelta(1)
    events = [
        event("acme", ["acme/poet", "acme/coder"]),
        event("acme", at=yesterday, status=429, prompt_tokens=0, cached_tokens=0, completion_tokens=0),
        event("globex", ["acme/poet"], completion_tokens=7, code="replica_died"),
    ]
    files.put("a" * 32, lines(*events), NOON, KEPT)
    assert counts(files, days=1) == {(): [3, 2, 10, 4, 10]}
    assert counts(files) == {(): [2, 1, 10, 4, 10]}
    assert counts(files, "day", "tenant", days=1) == {
        ("2026-11-28", "acme"): [1, 1, 0, 0, 0],
        ("2026-11-29", "acme"): [1, 0, 5, 2, 3],
        ("2026-11-29", "globex"): [1, 1, 5, 2, 7],
    }
    assert counts(files, "adapter", days=1) == {
        (None,): [1, 1, 0, 0, 0],
        ("acme/coder",): [1, 0, 5, 2, 3],
        ("acme/poet",): [2, 1, 10, 4, 10],
    }
    assert counts(files, "key", "base", tenant="globex", days=1) == {("globex-1", "tiny"): [1, 1, 5, 2, 7]}
    assert counts(files, tenant="nobody", days=1) == {}
    [row] = files.sums(UsageQuery(TODAY, TODAY, ("tenant",), "acme"))
    assert row["last_at"] == NOON
    for by, tenant, expected in (((), None, 2), (("adapter",), None, 2), ((), "acme", 1)):
        [row] = files.sums(UsageQuery(TODAY, TODAY, by, tenant, "acme/poet"))  # type: ignore[arg-type]
        assert row["requests"] == expected
    assert files.sums(UsageQuery(TODAY, TODAY, (), None, "acme/nosuch")) == []


def test_versions_are_told_apart_and_durations_equal_a_slow_count(files: UsageFiles) -> None:
    rng = random.Random(0)
    events = []
    for _ in range(400):
        digest, total_s = rng.choice(["d1", "d2"]), rng.choice([None, rng.expovariate(1)])
        used = [{"name": "acme/poet", "digest": digest, "weight": 1.0}]
        events.append(event(at=NOON - timedelta(rng.randrange(3))) | {"adapters": used, "total_s": total_s})
    files.put("a" * 32, lines(*events), NOON, KEPT)
    query = UsageQuery(TODAY - timedelta(3), TODAY, ("version",), "acme", "acme/poet")
    rows = {row["version"]: row for row in files.sums(query)}
    assert rows.keys() == {"d1", "d2"}
    for digest, row in rows.items():
        own = [one["total_s"] for one in events if one["adapters"][0]["digest"] == digest]
        timed = sorted(seconds for seconds in own if seconds is not None)
        p95 = timed[math.ceil(0.95 * len(timed)) - 1]
        assert row["requests"] == len(own)
        assert row["mean_s"] == pytest.approx(sum(timed) / len(timed), rel=1e-3)
        assert p95 * 0.999 <= row["p95_s"] <= p95 * 1.06
    files.put("b" * 32, lines(event("globex", ["acme/poet"], total_s=None)), NOON, KEPT)
    [row] = files.sums(UsageQuery(TODAY, TODAY, ("adapter", "version"), "globex"))
    assert (row["version"], row["mean_s"], row["p95_s"]) == ("of-acme/poet", None, None)
    [row] = files.sums(UsageQuery(TODAY, TODAY, (), "globex"))
    assert (row["requests"], row["p95_s"]) == (1, None)
    both = [{"name": "acme/poet", "digest": digest, "weight": 0.5} for digest in ("d1", "d2")]
    files.put("c" * 32, lines(event("initech") | {"adapters": both}), NOON, KEPT)
    for by, expected in ((("version",), 2), (("adapter",), 1)):
        assert len(files.sums(UsageQuery(TODAY, TODAY, by, "initech"))) == expected  # type: ignore[arg-type]
    [row] = files.sums(UsageQuery(TODAY, TODAY, ("adapter",), "initech"))
    assert row["requests"] == 1


def test_a_segment_cut_anywhere_in_its_last_event_keeps_all_others() -> None:
    whole, last = lines(event(), event("globex")), lines(event("ünïcode"))
    for cut in range(len(last) - 1):  # the last byte ends the line
        found = list(parse_events("s", whole + last[:cut]))
        assert [one["id"] for one in found] == ["s-0", "s-1"], cut
    assert [one["tenant"] for one in parse_events("s", whole + last)] == ["acme", "globex", "ünïcode"]
    assert len(list(parse_events("s", whole + last[:-1]))) == 3


def test_a_segment_that_arrives_twice_counts_once_also_after_a_merge(files: UsageFiles) -> None:
    first, second = lines(event(), event()), lines(event())
    files.put("a" * 32, first, NOON, KEPT)
    files.put("b" * 32, second, NOON, KEPT)
    files.put("a" * 32, first, NOON, KEPT)
    assert counts(files)[()][0] == 3
    files.tidy(NOON + timedelta(1), KEPT)
    files.put("a" * 32, first, NOON, KEPT)  # its sender died before it knew that the segment had arrived
    assert counts(files)[()][0] == 3
    files.tidy(NOON + timedelta(1), KEPT)
    assert counts(files)[()][0] == 3


def test_earlier_days_become_one_file_each_and_old_days_are_deleted(store_uri: str) -> None:
    location = Location(store_uri).child("usage")
    files, stored = UsageFiles(location), Files(location)
    for number in range(3):
        days = [event(at=NOON - timedelta(age)) for age in (0, 1, 10)]
        UsageFiles(location).put(f"{number}" * 32, lines(*days), NOON, KEPT)
    before = counts(files, "day", days=20)
    files.tidy(NOON, timedelta(5))
    names = [file.name.partition("/")[0] for file in stored.entries()]
    assert sorted(names) == ["day=2026-11-28", *["day=2026-11-29"] * 3]
    del before["2026-11-19",]
    assert counts(files, "day", days=20) == before


def test_many_segments_within_a_minute_do_not_become_many_files(files: UsageFiles, stored: Files) -> None:
    most = 0
    for number in range(100):
        files.put(f"{number:032}", lines(event()), NOON, KEPT)
        most = max(most, len(stored.entries()))
    assert most <= 70
    assert counts(files)[()][0] == 100


def test_a_report_of_too_many_rows_is_cut_behind_them(files: UsageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_ROWS", 5)
    files.put("a" * 32, lines(*(event(key=f"k{number}") for number in range(20))), NOON, KEPT)
    assert len(counts(files, "key")) == 6
    assert counts(files)[()][0] == 20


def test_a_merge_keeps_columns_of_a_newer_version(files: UsageFiles, stored: Files, folder_uri: str) -> None:
    files.put("a" * 32, lines(event()), NOON, KEPT)
    [file] = stored.entries()
    table = pq.read_table(Path(folder_uri, "usage", file.name), partitioning=None)
    newer = table.set_column(0, "id", pa.array(["c-0"])).append_column("region", pa.array(["north"]))
    rewrite(stored, file.name.replace("a" * 32, "c" * 32), newer)
    files.tidy(NOON + timedelta(1), KEPT)
    [merged] = stored.entries()
    found = pq.read_table(Path(folder_uri, "usage", merged.name), partitioning=None)
    assert sorted(map(str, found["region"].to_pylist())) == ["None", "north"]
    assert counts(files)[()][0] == 2


def test_files_that_an_operator_rewrote_with_other_types_are_read_and_merged(
    files: UsageFiles, stored: Files, folder_uri: str
) -> None:
    files.put("a" * 32, lines(event(adapters=["poet"]), event(status=500)), NOON, KEPT)
    [file] = stored.entries()
    table = pq.read_table(Path(folder_uri, "usage", file.name), partitioning=None)
    types = {"tenant": pa.large_string(), "status": pa.int64(), "time": pa.timestamp("ns", tz="UTC")}
    for name, type_ in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(type_))
    rewrite(stored, file.name, table.select(table.column_names[::-1]))
    files.put("b" * 32, lines(event()), NOON, KEPT)
    for _ in range(2):
        by_adapter = {("acme", None): [2, 1, 10, 4, 6], ("acme", "poet"): [1, 0, 5, 2, 3]}
        assert counts(files, "tenant", "adapter") == by_adapter
        files.tidy(NOON + timedelta(1), KEPT)
    assert len([*stored.entries()]) == 1


def test_a_damaged_file_is_left_out_of_reports_and_merges_and_named(
    files: UsageFiles, stored: Files, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        files.put(name * 32, lines(event()), NOON, KEPT)
    damaged = ["day=2026-11-29/cut.parquet", "day=2026-11-29/other.parquet"]
    whole = stored.read(stored.entries()[0].name)
    assert whole is not None
    stored.write(damaged[0], bytes(whole)[:-9])
    rewrite(stored, damaged[1], pa.table({"x": [1]}))
    for _ in range(2):
        assert counts(files, "tenant") == {("acme",): [2, 0, 10, 4, 6]}
        assert all(name in caplog.text for name in damaged)
        files.put("c" * 32, b"", NOON + timedelta(1), KEPT)
        assert damaged[0] in [file.name for file in stored.entries()]


@pytest.mark.parametrize("by", [("tenant",), ("tenant", "adapter")], ids=str)
@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_day_merged_or_deleted_while_it_is_read_is_read_as_it_is_then(
    is_deleted: bool, by: tuple[Dimension, ...], files: UsageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        files.put(name * 32, lines(event(name)), NOON, KEPT)
    read, merges = Files.read, [lambda: files.tidy(NOON + timedelta(1), timedelta(0) if is_deleted else KEPT)]

    def merging(self: Files, name: str) -> bytes | None:
        if merges:
            merges.pop()()
        return read(self, name)

    monkeypatch.setattr(Files, "read", merging)
    found = {tenant: sums for (tenant, *_), sums in counts(files, *by).items()}
    assert found == ({} if is_deleted else {"a": [1, 0, 5, 2, 3], "b": [1, 0, 5, 2, 3]})
