"""The usage of all requests: one event each, as Parquet files by day, `day=2026-11-29/NAME.parquet`.

A server sends events in segments of JSON lines. An event's id is its segment and its line, so a segment that arrives
twice, or a file that is read while another process merges it, counts each event once. Ids of requests would not do:
clients may choose them. Processes write, merge, read and delete without coordination.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, get_args
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lora_store.files import Files, StoredFile, open_for_arrow
from lora_store.location import Location

logger = logging.getLogger(__name__)
Dimension = Literal["day", "tenant", "key", "adapter", "version", "base"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
ADAPTER = pa.struct([("name", pa.string()), ("digest", pa.string()), ("weight", pa.float64())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("time", pa.timestamp("ms", tz="UTC")),  # when the request ended
        ("request_id", pa.string()),
        ("tenant", pa.string()),
        ("key", pa.string()),  # its id
        ("route", pa.string()),
        ("model", pa.string()),  # as the client asked
        ("base", pa.string()),
        ("adapters", pa.list_(ADAPTER)),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),  # prompt tokens found in the cache
        ("completion_tokens", pa.int64()),
        ("status", pa.int16()),
        ("code", pa.string()),  # the error's code
        ("queued_s", pa.float32()),
        ("first_token_s", pa.float32()),
        ("total_s", pa.float32()),
    ]
)
MAX_ROWS = 10_000  # in one report
SUMS = ("requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens")
_READ = ("id", "time", "tenant", "key", "base", "adapters", "status", "code", *SUMS[2:], "total_s")
_STEP = 1.05  # between the bounds of durations: a percentile is at most 5 % too long
_SLOW = 0.95
_FIRST_ERROR = 400
_TIDY_EVERY = timedelta(minutes=10)
_MANY = 32  # files of the present day; those of earlier days become one
_LARGE_BYTES = 32 << 20  # a file of this size is not merged any more
_SUFFIX = ".parquet"


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """The days from `start` to `end`, both included. `tenant`: only this one's requests.

    `adapter`: only those that this one, `tenant/name`, answered.
    """

    start: date
    end: date
    by: tuple[Dimension, ...] = ()
    tenant: str | None = None
    adapter: str | None = None


class UsageFiles:
    """The events below `location`. Raises: StoreUnavailable."""

    def __init__(self, location: Location) -> None:
        self._files = Files(location)
        self._tidied_at: datetime | None = None
        self._num_new = 0  # files since then

    def put(self, segment: str, lines: bytes, now: datetime, kept: timedelta | None) -> None:
        """Store a segment's events. Now and then merge small files, and delete days older than `kept`, unless None."""
        by_day: dict[str, list[dict[str, Any]]] = {}
        for event in parse_events(segment, lines):
            day = datetime.fromtimestamp(event["time"] / 1000, UTC).date()
            by_day.setdefault(_folder(day), []).append(event)
        for folder, events in by_day.items():
            self._write(f"{folder}/{segment}{_SUFFIX}", pa.Table.from_pylist(events, SCHEMA))
        self._num_new += len(by_day)
        if self._tidied_at is None or now - self._tidied_at >= _TIDY_EVERY or self._num_new > _MANY:
            self._tidied_at, self._num_new = now, 0
            self.tidy(now, kept)

    def tidy(self, now: datetime, kept: timedelta | None) -> None:
        """Merge the small files of each day, and delete days older than `kept`, unless None."""
        today, oldest = _folder(now.date()), "" if kept is None else _folder((now - kept).date())
        for folder, files in self._by_day().items():
            if folder < oldest:
                self._files.delete([file.name for file in files])
                continue
            small = [file for file in files if file.num_bytes < _LARGE_BYTES]
            if len(small) > (_MANY if folder == today else 1):
                self._merge(folder, small)

    def sums(self, query: UsageQuery) -> list[dict[str, Any]]:
        """Return one row for each group, in order, with its sums and the time of its last event.

        A report of more than MAX_ROWS has some of its rows, more than MAX_ROWS: days, keys and adapters make millions.
        A request counts for each of its adapters: by `adapter` or `version`, sums over the rows may exceed the total.
        An `adapter` of None is the base model. `mean_s` and `p95_s` are of the requests' durations.
        """
        days = self._by_day().items()
        wanted = [(day, files) for day, files in days if _folder(query.start) <= day <= _folder(query.end)]
        found = [_sums_of_day(self._read_day(day, files), day, query) for day, files in wanted]
        if not found:
            return []
        summed = _summed(pa.concat_tables(found), query.by, {"bound": "list", "timed": "list"}).slice(0, MAX_ROWS + 1)
        rows = [_with_durations(row) for row in summed.to_pylist() if row["requests"]]
        return sorted(rows, key=lambda row: [str(row[name] or "") for name in query.by])

    def _by_day(self) -> dict[str, list[StoredFile]]:
        found: dict[str, list[StoredFile]] = {}
        for file in sorted(self._files.entries(), key=lambda file: file.name):
            folder, _, name = file.name.partition("/")
            if name.endswith(_SUFFIX) and not name.startswith("."):
                found.setdefault(folder, []).append(file)
        return found

    def _read_day(self, folder: str, files: Sequence[StoredFile]) -> pa.Table:
        """Return the day's events. If a file was merged or deleted meanwhile, list them again."""
        while True:
            tables = [self._read(file.name, _READ) for file in files]
            if all(table is not None for table in tables):
                return _first_of_each(pa.concat_tables([_choose_columns(_READ).empty_table(), *tables]), ["id"])
            files = self._by_day().get(folder, [])

    def _merge(self, folder: str, files: Sequence[StoredFile]) -> None:
        """Write these files as one, with all columns that any has, and delete them."""
        tables: dict[str, pa.Table] = {}
        num_bytes = 0
        for file in files:
            if num_bytes < _LARGE_BYTES and (table := self._read(file.name)) is not None:
                tables[file.name] = table
                num_bytes += file.num_bytes
        if len(tables) > 1:
            merged = _first_of_each(pa.concat_tables(tables.values(), promote_options="permissive"), ["id"])
            self._write(f"{folder}/{uuid4().hex}{_SUFFIX}", merged)
            self._files.delete(tables)

    def _read(self, name: str, columns: Collection[str] | None = None) -> pa.Table | None:
        """Return the file, or None if it is gone. `columns` have the types of SCHEMA, whoever wrote the file.

        A damaged file is left where it is: it has no events for a report, and is not there for a merge.
        """
        content = self._files.read(name)
        if content is None:
            return None
        try:
            read = [*_READ] if columns is None else [*columns]
            table = pq.read_table(open_for_arrow(content), columns=None if columns is None else read)
            typed = table.select(read).cast(_choose_columns(read), safe=False)
            return table if columns is None else typed
        except (pa.ArrowException, OSError, KeyError) as exc:
            cause = str(exc).partition("\n")[0]
            logger.warning("the usage file %s is damaged; reports leave it out: %s", name, cause)
            return None if columns is None else _choose_columns(columns).empty_table()

    def _write(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self._files.write(name, sink.getvalue())


def parse_events(segment: str, lines: bytes) -> Iterator[dict[str, Any]]:
    """Yield the events of a segment. Skip a line that a crash or a full disk left incomplete."""
    for number, line in enumerate(lines.split(b"\n")):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        yield {**event, "id": f"{segment}-{number}"}


def _choose_columns(columns: Iterable[str]) -> pa.Schema:
    return pa.schema([SCHEMA.field(column) for column in columns])


def _folder(day: date) -> str:
    return f"day={day.isoformat()}"


def _sums_of_day(events: pa.Table, folder: str, query: UsageQuery) -> pa.Table:
    if query.tenant is not None:
        events = events.filter(pc.equal(events["tenant"], query.tenant))
    if {"adapter", "version"} & {*query.by} or query.adapter is not None:
        events = _first_of_each(_with_each_adapter(events), ["id", *{"adapter", *query.by} & {"adapter", "version"}])
    if query.adapter is not None:
        events = events.filter(pc.equal(events["adapter"], query.adapter))
    given: dict[str, Any] = {name: events[name] for name in DIMENSIONS[1:] if name in query.by}
    ones = pa.array(np.ones(len(events), np.int64))
    failed = pc.or_(pc.greater_equal(events["status"], _FIRST_ERROR), pc.not_equal(events["code"], ""))
    day = pa.array([folder.removeprefix("day=")] * len(events), pa.string())
    columns: dict[str, Any] = {"day": day, **given, "requests": ones, "errors": pc.cast(failed, pa.int64())}
    columns |= {name: events[name] for name in SUMS[2:]}
    seconds = pc.cast(events["total_s"], pa.float64())
    columns |= {"bound": pc.ceil(pc.logb(pc.max_element_wise(seconds, 1e-6, skip_nulls=False), _STEP))}
    columns |= {"seconds": seconds, "timed": pc.cast(pc.is_valid(seconds), pa.int64()), "last_at": events["time"]}
    return _summed(pa.table(columns), [*query.by, "bound"], {"timed": "sum"})


def _with_each_adapter(events: pa.Table) -> pa.Table:
    """Return the events once for each of their adapters, in columns of their names and digests; null for the base."""
    lists = events["adapters"].combine_chunks()
    flat, used = pc.list_flatten(lists), events.take(pc.list_parent_indices(lists))
    none = events.filter(pc.equal(pc.list_value_length(lists), 0))
    for column, field in (("adapter", "name"), ("version", "digest")):
        used = used.append_column(column, pc.struct_field(flat, field))
        none = none.append_column(column, pa.nulls(len(none), pa.string()))
    return pa.concat_tables([used, none])


def _summed(table: pa.Table, by: Iterable[str], more: Mapping[str, str]) -> pa.Table:
    """Return the sums of each group, its last time, and `more` aggregates of other columns."""
    wanted = {**dict.fromkeys((*SUMS, "seconds"), "sum"), "last_at": "max", **more}
    one = pa.array(np.zeros(len(table), np.int8))  # lists need a group
    summed = table.append_column("one", one).group_by(["one", *by]).aggregate([*wanted.items()]).drop_columns(["one"])
    names = {f"{name}_{how}": name for name, how in wanted.items()}
    return summed.rename_columns([names.get(name, name) for name in summed.column_names])


def _with_durations(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the mean of its durations and the bound of 95 % of them; None if no event has one."""
    counts = sorted((bound, timed) for bound, timed in zip(row.pop("bound"), row.pop("timed"), strict=True) if timed)
    seconds, num_timed = row.pop("seconds"), sum(timed for _, timed in counts)
    reached = np.cumsum([timed for _, timed in counts])
    place = int(np.searchsorted(reached, _SLOW * num_timed))
    p95 = round(_STEP ** counts[place][0], 4) if counts else None
    return row | {"mean_s": round(seconds / num_timed, 4) if counts else None, "p95_s": p95}


def _first_of_each(table: pa.Table, keys: list[str]) -> pa.Table:
    """Return the first row of each combination of the keys."""
    rows = table.select(keys).append_column("row", pa.array(np.arange(len(table))))
    return table.take(rows.group_by(keys).aggregate([("row", "min")])["row_min"])
