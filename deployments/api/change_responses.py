"""Responses to changes of the pool: publishing, approving, withdrawing, and changing who may use an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from deployments.api import error_table
from deployments.api.change_results import Published, Removed, Settled
from deployments.api.responses import CandidateRow, JsonObject, candidate_rows
from lora_store import AdapterRef


class Replicas(TypedDict):
    """How many Retriever replicas know of the change, and how many do not yet."""

    ready: int
    behind: int


class PublishedAdapter(TypedDict):
    name: str
    digest: str
    generation: int
    replicas: Replicas
    found_by_auto: bool
    probe_shift: float | None
    neighbours: list[CandidateRow]


class SettledAdapter(TypedDict):
    """An adapter whose visibility or approval was changed."""

    name: str
    visibility: NotRequired[str]
    digest: NotRequired[str]
    approved: NotRequired[bool]
    generation: int
    replicas: Replicas


class BatchAnswer(TypedDict):
    """One object per adapter, with the status that it would have alone."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class RemovedAdapters(TypedDict):
    names: list[str]
    deleted: bool
    generation: int
    replicas: Replicas


def published_object(published: Published) -> PublishedAdapter:
    return {
        "name": published.ref.name,
        "digest": published.ref.digest,
        "generation": published.generation,
        "replicas": replicas_object(published),
        "found_by_auto": published.found_by_auto,
        "probe_shift": published.probe_shift,
        "neighbours": candidate_rows(published.neighbours, published.ref.tenant),
    }


def replicas_object(change: Published | Removed | Settled) -> Replicas:
    return {"ready": change.ready, "behind": change.behind}


def status_of(published: Published) -> int:
    """Return 201, or 202 while a Retriever replica does not route to it yet."""
    return 202 if published.behind else 201


def batch_object(outcomes: Sequence[Published | Exception]) -> BatchAnswer:
    """Return one object per adapter of a batch, in order: the answer that it would get alone, with its status."""
    data: list[JsonObject] = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            status, body = error_table.describe(outcome)
            data.append({"status": status, **body})
        else:
            data.append({"status": status_of(outcome), **published_object(outcome)})
    return {"object": "list", "data": data}


def visibility_object(name: str, visibility: str, settled: Settled) -> SettledAdapter:
    replicas = replicas_object(settled)
    return {"name": name, "visibility": visibility, "generation": settled.generation, "replicas": replicas}


def approval_object(ref: AdapterRef, settled: Settled) -> SettledAdapter:
    replicas, generation = replicas_object(settled), settled.generation
    return {"name": ref.name, "digest": ref.digest, "approved": True, "generation": generation, "replicas": replicas}


def removed_object(removed: Removed) -> RemovedAdapters:
    return {
        "names": list(removed.names),
        "deleted": True,
        "generation": removed.generation,
        "replicas": replicas_object(removed),
    }
