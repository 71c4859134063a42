"""The events that change the pool, and their form as rows of the catalogue's table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from lora_store.names import NamedPolicy
from lora_store.rankings import Ranking
from lora_store.records import AdapterRecord, Embedding, OutputProfile, Visibility
from lora_store.trials import Trial


@dataclass(frozen=True, slots=True)
class Publish:
    """A version becomes the live one of its name. The commit that writes the event sets its generation.

    A private version makes the older ones private too. A version that `is_offered` is kept with the live one, which
    gets the trial of the record.
    """

    record: AdapterRecord


@dataclass(frozen=True, slots=True)
class Withdraw:
    """A name and all its versions are withdrawn. `ref` is the version that was live."""

    ref: AdapterRef
    actor: str
    at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class Embed:
    """A version gets an embedding by an encoder that may be activated later."""

    ref: AdapterRef
    embedding: Embedding


@dataclass(frozen=True, slots=True)
class ActivateEncoder:
    """From this event on, searches use this encoder's embeddings."""

    model: str
    identity: str
    actor: str
    at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class SetVisibility:
    """The live version of a name gets this visibility.

    Making a name private makes its older versions private too. Making it public does not publish older versions, since
    no admin has reviewed them.
    """

    ref: AdapterRef
    visibility: Visibility
    actor: str
    at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class Approve:
    """An admin approved this version: `auto` may choose it for every tenant while it is public."""

    ref: AdapterRef
    actor: str
    at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class SetTrial:
    """The live version of a name gets this trial, or none."""

    ref: AdapterRef
    trial: Trial | None
    actor: str
    at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class Rank:
    """A tenant's `auto` uses this ranking. `is_first`: the tenant's earlier rankings are no longer used."""

    tenant: str
    ranking: Ranking
    is_first: bool
    actor: str
    at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class SetName:
    """A policy becomes the newest version of its name, or a kept version is approved; "" removes the name."""

    named: NamedPolicy


@dataclass(frozen=True, slots=True)
class Fold:
    """The state restarts: the Keep and Embed rows of the same generation hold the result of all earlier events.

    `model` and `identity` are those of the active encoder, None if there is none.
    """

    model: str | None
    identity: str | None


@dataclass(frozen=True, slots=True)
class Keep:
    """One kept version, part of a Fold: first the live one of its name, then the older ones, newest first."""

    record: AdapterRecord
    is_live: bool


@dataclass(frozen=True, slots=True)
class VisibleChange:
    """The newest change that a tenant can see, part of a Fold. `tenant` is "" for changes that everybody can see."""

    tenant: str
    generation: int


Change = Publish | Withdraw | Embed | ActivateEncoder | SetVisibility | Approve | SetTrial | Rank | SetName
Event = Change | Fold | Keep | VisibleChange

SCHEMA = pa.schema(
    [
        pa.field("generation", pa.int64(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # the order within one generation
        pa.field("event", pa.string(), nullable=False),
        pa.field("tenant", pa.string()),
        pa.field("name", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("weights_digest", pa.string()),
        pa.field("samples_digest", pa.string()),
        pa.field("visibility", pa.string()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("base_model", pa.string()),
        pa.field("ranks", pa.list_(pa.int32())),
        pa.field("target_modules", pa.list_(pa.string())),
        pa.field("num_bytes", pa.int64()),
        # In the first row of a fold: how many events the fold has. Older releases ignore it there.
        pa.field("num_samples", pa.int32()),
        pa.field("template", pa.string()),
        pa.field("encoder", pa.string()),
        pa.field("embedding", pa.list_(pa.float32())),
        pa.field("own_scores", pa.list_(pa.float32())),
        pa.field("probe_shift", pa.float64()),
        pa.field(
            "source", pa.string()
        ),  # where a publish came from, the model of an activated encoder, or the policy of a name
        pa.field("actor", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC")),
        pa.field("commit_id", pa.string()),  # null in rows that are older than this column
        pa.field("published_in", pa.int64()),  # rows of a fold: the original generation
        pa.field("approved", pa.bool_()),  # rows of a fold
        pa.field("output_labels", pa.list_(pa.string())),  # null without a profile of the outputs
        pa.field("output_vector", pa.binary()),  # int8
        pa.field("ranking", pa.string()),  # JSON
        pa.field("expires_at", pa.timestamp("us", tz="UTC")),  # null: it does not expire
        pa.field("trial", pa.string()),  # JSON; of a kept version that was never live: "offered"
        pa.field("live_since", pa.timestamp("us", tz="UTC")),  # null: since `created_at`
        pa.field("contract", pa.string()),  # JSON
    ]
)
_OFFERED = "offered"
_FOLD, _LIVE, _OLDER, _PENDING, _COMMIT = "fold", "keep_live", "keep_older", "keep_pending", "keep_commit"
_VISIBLE = "keep_shown"
_FIRST_RANK, _RANK = "rank_first", "rank"
_NAME = "set_name"
_AS_KEPT = {
    "embed": _PENDING,
    _FIRST_RANK: "keep_rank_first",
    _RANK: "keep_rank",
    _NAME: "keep_name",
}  # names of these rows in a fold
_FOLD_ROWS = (_FOLD, _LIVE, _OLDER, _COMMIT, _VISIBLE, *_AS_KEPT.values())
_CHANGES = (
    *("publish", "offer", "withdraw", "embed", "activate_encoder", "set_visibility", "approve", "set_trial"),
    *(_FIRST_RANK, _RANK, _NAME),
)
_ARRAYS = ("embedding", "own_scores")
_COLUMNS = (
    *("weights_digest", "samples_digest", "visibility", "tags", "base_model", "ranks", "target_modules", "num_bytes"),
    *("num_samples", "template", "probe_shift", "source", "actor", "created_at", "expires_at"),
    *("live_since", "contract"),
)
_LISTS = ("tags", "ranks", "target_modules", "output_labels")
_REPEATED = (
    *("event", "tenant", "visibility", "base_model", "template", "contract", "encoder", "actor", "created_at"),
    "commit_id",
)
_ROWS_AT_ONCE = 10_000
FOLD_PART_ROWS = 10_000  # events of a fold in each of its data files, except the last


def make_table(events: Sequence[Event], generation: int, commit_id: str | None = None) -> pa.Table:
    """Return the rows of one commit."""
    own = {"generation": generation, "commit_id": commit_id}
    rows = [_make_row(event) | own | {"row": number} for number, event in enumerate(events)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def make_fold_table(
    events: Sequence[Event], generation: int, commits: Mapping[str, int], part: slice = slice(None)
) -> pa.Table:
    """Return the rows of a fold as of `generation`: those of a part of its events, and of commits that it remembers.

    `commits` maps commit ids to generations.
    """
    rows: list[dict[str, Any]] = []
    for number, event in enumerate(events[part], part.start or 0):
        row = _make_row(event)
        kind = _AS_KEPT.get(row["event"], row["event"])
        size = {"num_samples": len(events)} if kind == _FOLD else {}
        rows.append(row | size | {"event": kind, "row": number})
    for number, (commit, at) in enumerate(commits.items(), len(events)):
        rows.append({"event": _COMMIT, "commit_id": commit, "published_in": at, "row": number})
    return pa.Table.from_pylist([row | {"generation": generation} for row in rows], schema=SCHEMA)


def is_whole_fold(rows: pa.Table) -> bool:
    """Return whether no event of a fold is missing in these rows of it; False if that cannot be told.

    A fold says the number of its events. One of an earlier release does not: it is known to be whole if its last part
    is there, the only one that may have fewer than FOLD_PART_ROWS events.
    """
    events = rows.filter(pc.not_equal(rows["event"], _COMMIT))
    sizes = dict(zip(events["row"].to_pylist(), events["num_samples"].to_pylist(), strict=True))
    if sizes.keys() != set(range(len(sizes))):
        return False
    size = sizes.get(0)
    return len(sizes) % FOLD_PART_ROWS != 0 if size is None else len(sizes) == size


def fold_generation(table: pa.Table) -> int:
    """Return the generation of the newest fold among the rows, or 0."""
    newest: int | None = pc.max(table["generation"].filter(pc.equal(table["event"], _FOLD))).as_py()
    return newest or 0


def knows_all_events(table: pa.Table) -> bool:
    """Return whether this release knows the kind of each event. A newer one writes others, which are skipped here."""
    known = pc.is_in(table["event"], pa.array(_FOLD_ROWS + _CHANGES))
    return bool(pc.all(known, min_count=0).as_py())


def is_of_fold(table: pa.Table) -> pa.ChunkedArray:
    """Return a mask of the rows that are part of a fold."""
    return pc.is_in(table["event"], pa.array(_FOLD_ROWS))


def event_counts(table: pa.Table, after: int) -> dict[int, int]:
    """Count the events of each generation above `after`, without the rows of folds."""
    is_event = pc.invert(is_of_fold(table))
    generations = table["generation"].filter(pc.and_(is_event, pc.greater(table["generation"], after)))
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(generations).to_pylist()}


def read_commits(table: pa.Table) -> dict[str, int]:
    """Return the generation of each commit by its id, oldest first. Rows of earlier versions have no id."""
    is_first = pc.or_(pc.equal(table["row"], 0), pc.equal(table["event"], _COMMIT))
    rows = table.select(["commit_id", "generation", "published_in"]).filter(
        pc.and_(is_first, pc.is_valid(table["commit_id"]))
    )
    generations = pc.coalesce(rows["published_in"], rows["generation"])
    pairs = zip(generations.to_pylist(), rows["commit_id"].to_pylist(), strict=True)
    return {commit: generation for generation, commit in sorted(pairs)}


def read_dated_events(table: pa.Table, after: int, until: int | None = None) -> Iterator[tuple[int, Event]]:
    """Yield (generation, event) of every row above generation `after`, up to `until` if given, in order.

    A fold above `after` replaces all events up to its generation. Kinds of events that only a newer release knows are
    skipped. Arrays are views of the table's memory and repeated
    values share one object, so a large pool opens in seconds and needs little more memory than its embeddings.
    """
    order = pc.sort_indices(table, [("generation", "ascending"), ("row", "ascending")])
    order = order.filter(_is_wanted(table, after, until).take(order))
    vectors, scores = (_read_arrays(table[name]) for name in _ARRAYS)
    plain = table.drop_columns([*_ARRAYS, "commit_id"]).combine_chunks()
    for start in range(0, len(order), _ROWS_AT_ONCE):
        indices = order.slice(start, _ROWS_AT_ONCE)
        columns = plain.take(indices)
        rows = zip(*(_read_values(name, columns[name]) for name in columns.column_names), strict=True)
        for index, row in zip(indices.to_pylist(), rows, strict=True):
            values = dict(zip(columns.column_names, row, strict=True))
            event = _read_event(values, vectors[index], scores[index])
            if event is not None:
                yield values["generation"], event


def _is_wanted(table: pa.Table, after: int, until: int | None) -> pa.ChunkedArray:
    """Return a mask of the rows to replay: the newest fold if it is above `after`, and all events after both."""
    generations, fold = table["generation"], fold_generation(table)
    is_kept = pc.and_(pc.equal(generations, fold), is_of_fold(table))
    is_kept = pc.and_(is_kept, pc.and_(pc.not_equal(table["event"], _COMMIT), fold > after))
    wanted = pc.or_(is_kept, pc.greater(generations, max(after, fold)))
    return wanted if until is None else pc.and_(wanted, pc.less_equal(generations, until))


def _make_row(event: Event) -> dict[str, Any]:
    match event:
        case Publish(record):
            columns = {column: getattr(record, column) for column in _COLUMNS}
            columns |= {"event": "offer" if record.is_offered else "publish", "trial": _trial_to_json(record.trial)}
            return {**_ref_row(record.ref), **columns, **_embedding_row(record.embedding)}
        case SetTrial(ref, trial, actor, at):
            columns = {"trial": _trial_to_json(trial), "actor": actor, "created_at": at}
            return {"event": "set_trial", **_ref_row(ref), **columns}
        case Withdraw(ref, actor, at):
            return {"event": "withdraw", **_ref_row(ref), "actor": actor, "created_at": at}
        case SetVisibility(ref, visibility, actor, at):
            columns = {"visibility": visibility, "actor": actor, "created_at": at}
            return {"event": "set_visibility", **_ref_row(ref), **columns}
        case Approve(ref, actor, at):
            return {"event": "approve", **_ref_row(ref), "actor": actor, "created_at": at}
        case Rank(tenant, ranking, is_first, actor, at):
            arrays = {"encoder": ranking.encoder, "embedding": ranking.vector, "own_scores": ranking.own_scores}
            columns = {"tenant": tenant, "ranking": ranking.to_json(), "actor": actor, "created_at": at}
            return {"event": _FIRST_RANK if is_first else _RANK, **arrays, **columns}
        case SetName(named):
            columns = {"source": named.policy, "approved": named.approved}
            return {
                "event": _NAME,
                **_ref_row(named.ref),
                **columns,
                "actor": named.actor,
                "created_at": named.created_at,
            }
        case Embed(ref, embedding):
            return {"event": "embed", **_ref_row(ref), **_embedding_row(embedding)}
        case Keep(record, is_live):
            own = {"published_in": record.generation, "approved": record.approved}
            offered = {"trial": _OFFERED} if record.is_offered else {}
            return _make_row(Publish(record)) | own | offered | {"event": _LIVE if is_live else _OLDER}
        case Fold(model, identity):
            return {"event": _FOLD, "source": model, "encoder": identity}
        case VisibleChange(tenant, generation):
            return {"event": _VISIBLE, "tenant": tenant, "published_in": generation}
        case ActivateEncoder(model, identity, actor, at):
            return {
                "event": "activate_encoder",
                "source": model,
                "encoder": identity,
                "actor": actor,
                "created_at": at,
            }


def _read_event(
    row: dict[str, Any], vector: NDArray[np.float32] | None, own_scores: NDArray[np.float32] | None
) -> Event | None:
    """Return the event of a row, None if its kind is unknown."""
    embedding = None
    if vector is not None:
        own_scores = np.empty(0, np.float32) if own_scores is None else own_scores
        embedding = Embedding(row["encoder"], vector, own_scores, _read_outputs(row))
    match row["event"]:
        case "publish":
            return Publish(_read_record(row, embedding, row["generation"]))
        case "offer":
            return Publish(replace(_read_record(row, embedding, row["generation"]), is_offered=True))
        case "set_trial":
            return SetTrial(_read_ref(row), _read_trial(row), row["actor"], row["created_at"])
        case "withdraw":
            return Withdraw(_read_ref(row), row["actor"], row["created_at"])
        case "set_visibility":
            return SetVisibility(_read_ref(row), row["visibility"], row["actor"], row["created_at"])
        case "approve":
            return Approve(_read_ref(row), row["actor"], row["created_at"])
        case "keep_live" | "keep_older" as kind:
            record = _read_record(row, embedding, row["published_in"], approved=bool(row["approved"]))
            return Keep(record, is_live=kind == _LIVE)
        case "fold":
            return Fold(row["source"], row["encoder"])
        case "keep_shown":
            return VisibleChange(row["tenant"], row["published_in"])
        case "rank_first" | "rank" | "keep_rank_first" | "keep_rank" as kind if embedding is not None:
            ranking = Ranking.from_json(row["ranking"], row["encoder"], embedding.vector, embedding.own_scores)
            return Rank(row["tenant"], ranking, kind.endswith("first"), row["actor"], row["created_at"])
        case "set_name" | "keep_name":
            return SetName(
                NamedPolicy(_read_ref(row), row["source"], row["actor"], row["created_at"], bool(row["approved"]))
            )
        case "embed" | "keep_pending" if embedding is not None:
            return Embed(_read_ref(row), embedding)
        case "activate_encoder":
            return ActivateEncoder(row["source"], row["encoder"], row["actor"], row["created_at"])
    return None


def _read_record(
    row: dict[str, Any], embedding: Embedding | None, generation: int, *, approved: bool = False
) -> AdapterRecord:
    values = {column: row[column] for column in _COLUMNS}
    shift = values["probe_shift"]
    if shift is not None and not math.isfinite(shift):  # earlier versions stored NaN, which no answer can hold
        values["probe_shift"] = None
    values |= {"approved": approved, "trial": _read_trial(row), "is_offered": row["trial"] == _OFFERED}
    return AdapterRecord(ref=_read_ref(row), embedding=embedding, generation=generation, **values)


def _trial_to_json(trial: Trial | None) -> str | None:
    return None if trial is None else trial.to_json()


def _read_trial(row: dict[str, Any]) -> Trial | None:
    return None if row["trial"] in (None, _OFFERED) else Trial.from_json(row["trial"])


def _ref_row(ref: AdapterRef) -> dict[str, str]:
    return {"tenant": ref.tenant, "name": ref.name, "digest": ref.digest}


def _read_ref(row: dict[str, Any]) -> AdapterRef:
    return AdapterRef(row["tenant"], row["name"], row["digest"])


def _embedding_row(embedding: Embedding | None) -> dict[str, Any]:
    if embedding is None:
        return {}
    row: dict[str, Any] = {
        "encoder": embedding.encoder,
        "embedding": embedding.vector,
        "own_scores": embedding.own_scores,
    }
    if embedding.outputs is not None:
        vector = embedding.outputs.vector
        row["output_labels"] = embedding.outputs.labels
        row["output_vector"] = None if vector is None else vector.tobytes()
    return row


def _read_outputs(row: Mapping[str, Any]) -> OutputProfile | None:
    labels, vector = row["output_labels"], row["output_vector"]
    if labels is None:
        return None
    return OutputProfile(labels, None if vector is None else np.frombuffer(vector, np.int8))


def _read_arrays(column: pa.ChunkedArray) -> list[NDArray[np.float32] | None]:
    """Return one float32 view per row, None for a null."""
    views: list[NDArray[np.float32] | None] = []
    for lists in column.chunks:
        values, offsets = lists.values.to_numpy(), lists.offsets.to_pylist()
        present = lists.is_valid().to_pylist()
        views += [values[offsets[i] : offsets[i + 1]] if present[i] else None for i in range(len(lists))]
    return views


def _read_values(name: str, column: pa.ChunkedArray) -> list[Any]:
    """Return the column's values. In columns with many repeated values, equal values share one object."""
    if name in _LISTS:
        shared: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        lists = (None if value is None else tuple(value) for value in column.to_pylist())
        return [None if value is None else shared.setdefault(value, value) for value in lists]
    if name in _REPEATED:
        encoded = column.combine_chunks().dictionary_encode()
        values = [*encoded.dictionary.to_pylist(), None]
        return [values[-1 if index is None else index] for index in encoded.indices.to_pylist()]
    return list(column.to_pylist())
