"""Responses about the pool: adapters, models, the map, statistics and health."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal, NotRequired, cast

from typing_extensions import TypedDict

from deployments.api.responses import TrialObject, trial_object
from deployments.json_types import JsonObject
from lora_store import AdapterRecord, Feedback, Ranking, Sample
from lora_store.usage import UsageQuery
from retriever_svc import BaseCounts, Page, Place, Point, PoolMap

VersionField = Literal["weights", "samples", "tags", "template", "contract"]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    template: str  # of its chats: alpaca or chat; auto where this replica has not the model's files
    sampling_defaults: dict[str, float]  # for parameters that a request leaves unset, the settings' or the base model's
    strategies: NotRequired[dict[str, str]]  # of auto: the names of the strategies, with what each composes
    weights: NotRequired[dict[str, str]]  # of auto: the names of the weightings, with the weights that they give
    accepts_base: NotRequired[list[str]]  # base models that adapters may name; of the base model, for keys that publish


class ModelList(TypedDict):
    """One page of a list, as in the OpenAI API. If `has_more`, continue `after` the `last_id`."""

    object: Literal["list"]
    data: list[ModelCard]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Adapter(TypedDict):
    """`id`: the name that the caller uses for it: `name`, or `tenant/name` for another tenant's adapter."""

    id: str
    name: str
    tenant: str
    digest: str
    weights_digest: str
    visibility: str
    approved: bool
    tags: list[str]
    base_model: str
    ranks: list[int]
    target_modules: list[str]
    num_bytes: int
    num_samples: int
    template: str | None
    found_by_auto: bool
    probe_shift: float | None
    source: str
    created_at: str  # of the first publish of this version
    live_since: str
    generation: int
    expires_at: str | None
    trial: TrialObject | None


class Unserved(TypedDict):
    """Adapters that were made for another base model. `text`: a sentence with the remedy."""

    base_model: str
    num_adapters: int
    text: str


class AdapterList(TypedDict):
    """One page of the adapters that the caller may use. `tenant`: the caller's.

    `unserved`: others, of base models that are not served.
    """

    object: Literal["list"]
    tenant: str
    generation: int
    total: int
    unserved: list[Unserved]
    data: list[Adapter]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdapterVersion(TypedDict):
    """`differs`: what is not as in the live version."""

    digest: str
    state: Literal["live", "trial", "shadow", "kept"]
    generation: int
    created_at: str
    source: str
    actor: str
    tags: list[str]
    template: str | None
    num_samples: int
    differs: list[VersionField]


class ShownSample(TypedDict):
    input: str
    output: str | None


class ProposedSample(TypedDict):
    """A prompt of a request that named the adapter, with the key that sent it."""

    id: str
    input: str
    key_id: str


class AdapterShown(Adapter):
    """`versions`: the kept versions of the name, the live one first. `samples`: as many as the query asks for.

    `proposed`: prompts that may become samples, newest first, if the query asks for them. `evaluation`: the adapters
    that the tenant's last evaluation measured on the examples of the live version, best first, if the query asks.
    """

    contract: JsonObject | None
    versions: list[AdapterVersion]
    catalogue_generation: int
    samples: list[ShownSample]
    proposed: list[ProposedSample]
    evaluation: JsonObject | None


class Outcome(TypedDict):
    """A recorded outcome. `applies`: it changes the tenant's own choices within seconds; else it is only counted."""

    request_id: str
    adapter: str | None
    score: float
    applies: bool


class CollectedBlobs(TypedDict):
    """`num_bytes`: of the blobs and of the projections."""

    num_blobs: int
    num_bytes: int
    num_projections: int


class Health(TypedDict):
    status: Literal["ok"]


ModelState = Literal["ready", "asleep", "unavailable"]
"""Whether workers of a base model answer, are scaled to zero, or do not answer."""


class Ready(TypedDict):
    """The readiness; with keys only the status.

    `models`: the state of each base model, of several.
    `unserved`: adapters of base models that are not served. `refused`: preloaded adapters that are not published, with
    the reason.
    """

    status: Literal["ready"]
    models: NotRequired[dict[str, ModelState]]
    generation: NotRequired[int]
    num_adapters: NotRequired[int]
    unserved: NotRequired[list[Unserved]]
    refused: NotRequired[dict[str, str]]


class PlanePoint(TypedDict):
    x: float
    y: float


class MapPoint(TypedDict):
    name: str
    x: float
    y: float


class MapCluster(MapPoint):
    """Adapters near each other, as a disc. `name`: the tags or words of names that distinguish them."""

    radius: float
    num_adapters: int


class ClusteredPoint(MapPoint):
    """`cluster`: the position in `clusters`, from 0."""

    cluster: int


class PoolPicture(TypedDict):
    """The adapters that `auto` may choose for the caller, or of very many an even selection.

    A pool of few adapters is one cluster.
    """

    object: Literal["pool_map"]
    generation: int
    num_adapters: int
    clusters: list[MapCluster]
    points: list[ClusteredPoint]


class PromptPlace(TypedDict):
    object: Literal["pool_place"]
    generation: int
    prompt: PlanePoint
    adapters: list[MapPoint]


class Stats(TypedDict):
    """Sums over the replicas that answered. Counters rise until a replica is replaced.

    `tenant`: the caller's own rows and tokens; `workers`: those of all tenants, null unless the caller is an admin.
    `evaluation`: that of the tenant's adapters after a publish, as this Ingress replica knows it; null without the
    setting `evaluate_after_publish`. `base_model`: of several the first; `models`: the workers of each, by its name.
    """

    object: Literal["stats"]
    read_at: float
    base_model: str
    defaults: JsonObject
    pool: JsonObject
    tenant: JsonObject
    evaluation: JsonObject | None
    workers: JsonObject | None
    models: NotRequired[JsonObject]


class UsageRow(TypedDict):
    """The sums of one group. The dimensions by which the query groups are there.

    `adapter` is `tenant/name` and `version` its digest, null for the base model. `mean_s` and `p95_s`: the mean
    duration of the requests, and the one that 95 % of them did not exceed, at most 5 % too long; null if none was
    timed. Tokens are those of the answers' `usage`. `errors`: requests that did not end well, among them those whose
    clients left. `last_at`: when the last request ended.
    """

    day: NotRequired[str]
    tenant: NotRequired[str]
    key: NotRequired[str]
    adapter: NotRequired[str | None]
    version: NotRequired[str | None]
    base: NotRequired[str]
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    mean_s: float | None
    p95_s: float | None
    last_at: str


class UsageReport(TypedDict):
    """The usage from `start` to `end`. A request that several adapters answered is in the row of each.

    `tenant`: the only one that the rows are about, null for all. `usage_days`: how many days events are kept; 0 records
    none.
    """

    object: Literal["usage"]
    start: str
    end: str
    tenant: str | None
    usage_days: int
    data: list[UsageRow]


def usage_report(query: UsageQuery, rows: list[JsonObject], usage_days: int) -> UsageReport:
    """Return the rows as the API writes them."""
    data = [cast(UsageRow, row | {"last_at": row["last_at"].isoformat(timespec="seconds")}) for row in rows]
    return {
        "object": "usage",
        "start": query.start.isoformat(),
        "end": query.end.isoformat(),
        "tenant": query.tenant,
        "usage_days": usage_days,
        "data": data,
    }


def model_list(cards: list[ModelCard], *, has_more: bool) -> ModelList:
    first_id, last_id = (cards[0]["id"], cards[-1]["id"]) if cards else (None, None)
    return {"object": "list", "data": cards, "first_id": first_id, "last_id": last_id, "has_more": has_more}


def adapter_list(page: Page, tenant: str) -> AdapterList:
    """Return one page of adapters, under the names that `tenant` uses for them."""
    data = [lora_object(record, tenant) for _, record in page.rows]
    return {
        "object": "list",
        "tenant": tenant,
        "generation": page.generation,
        "total": page.num_found,
        "unserved": unserved_objects(page.unserved),
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }


def unserved_objects(unserved: BaseCounts) -> list[Unserved]:
    """Return the adapters of each base model that is not served."""
    return [
        {"base_model": base_model, "num_adapters": num, "text": unserved_text(base_model, num)}
        for base_model, num in unserved
    ]


def unserved_text(base_model: str, num_adapters: int) -> str:
    """Return a sentence that says what these adapters need."""
    base_model = base_model[:200]
    what = "1 adapter was made for" if num_adapters == 1 else f"{num_adapters} adapters were made for"
    verb = "is" if num_adapters == 1 else "are"
    return (
        f"{what} {base_model} and {verb} not served: start the server with base_model: {base_model},"
        " or add the name to accepts_base if it means the same weights"
    )


def lora_object(record: AdapterRecord, tenant: str) -> Adapter:
    """Return one adapter of the pool, as the Retriever answers it. `id` is the name that `tenant` uses for it."""
    return {
        "id": record.ref.name_for(tenant),
        "name": record.ref.name,
        "tenant": record.ref.tenant,
        "digest": record.ref.digest,
        "weights_digest": record.weights_digest,
        "visibility": record.visibility,
        "approved": record.approved,
        "tags": list(record.tags),
        "base_model": record.base_model,
        "ranks": list(record.ranks),
        "target_modules": list(record.target_modules),
        "num_bytes": record.num_bytes,
        "num_samples": record.num_samples,
        "template": record.template,
        "found_by_auto": record.embedding is not None,
        "probe_shift": record.probe_shift,
        "source": record.source,
        "created_at": record.created_at.isoformat(),
        "live_since": (record.live_since or record.created_at).isoformat(),
        "generation": record.generation,
        "expires_at": None if record.expires_at is None else record.expires_at.isoformat(),
        "trial": None if record.trial is None else trial_object(record.trial),
    }


def contract_object(record: AdapterRecord) -> JsonObject | None:
    """Return the contract of a version, None if it has none."""
    return None if record.contract is None else json.loads(record.contract)


def shown_object(
    versions: Sequence[AdapterRecord],
    tenant: str,
    generation: int,
    samples: Sequence[Sample] = (),
    proposed: Sequence[Feedback] = (),
    evaluation: Ranking | None = None,
) -> AdapterShown:
    """Return the live version of an adapter, with all kept versions."""
    return {
        **lora_object(versions[0], tenant),
        "contract": contract_object(versions[0]),
        "versions": versions_object(versions),
        "catalogue_generation": generation,
        "samples": [{"input": sample.input, "output": sample.output} for sample in samples],
        "proposed": [{"id": item.id, "input": item.text, "key_id": item.key_id} for item in proposed],
        "evaluation": None if evaluation is None else ranking_object(evaluation, tenant),
    }


def versions_object(versions: Sequence[AdapterRecord]) -> list[AdapterVersion]:
    """Return the kept versions of one name, the live one first."""
    return [
        {
            "digest": record.ref.digest,
            "state": _show_state(record, versions[0]) if place else "live",
            "generation": record.generation,
            "created_at": record.created_at.isoformat(),
            "source": record.source,
            "actor": record.actor,
            "tags": list(record.tags),
            "template": record.template,
            "num_samples": record.num_samples,
            "differs": _differences(record, versions[0]),
        }
        for place, record in enumerate(versions)
    ]


def _differences(record: AdapterRecord, live: AdapterRecord) -> list[VersionField]:
    compared: dict[VersionField, bool] = {
        "weights": record.weights_digest != live.weights_digest,
        "samples": record.samples_digest != live.samples_digest,
        "tags": record.tags != live.tags,
        "template": record.template != live.template,
        "contract": record.contract != live.contract,
    }
    return [field for field, is_other in compared.items() if is_other]


def _show_state(older: AdapterRecord, live: AdapterRecord) -> Literal["trial", "shadow", "kept"]:
    if live.trial is None or live.trial.digest != older.ref.digest:
        return "kept"
    return "shadow" if live.trial.is_shadow else "trial"


def map_object(drawn: PoolMap) -> PoolPicture:
    points = zip(drawn.names, drawn.places, drawn.groups, strict=True)
    return {
        "object": "pool_map",
        "generation": drawn.generation,
        "num_adapters": drawn.num_adapters,
        "clusters": [cast(MapCluster, asdict(cluster)) for cluster in drawn.clusters],
        "points": [{"name": name, "x": x, "y": y, "cluster": group} for name, (x, y), group in points],
    }


def map_body(drawn: PoolMap) -> bytes:
    """Return the JSON of a map."""
    return json.dumps(map_object(drawn), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def place_object(found: Place, tenant: str) -> PromptPlace:
    return {
        "object": "pool_place",
        "generation": found.generation,
        "prompt": {"x": found.prompt.x, "y": found.prompt.y},
        "adapters": [point_object(point, tenant) for point in found.adapters],
    }


def point_object(point: Point, tenant: str) -> MapPoint:
    """Return an adapter on the map, under the name that `tenant` uses for it."""
    assert point.ref is not None
    return {"name": point.ref.name_for(tenant), "x": point.x, "y": point.y}


def ranking_object(ranking: Ranking, tenant: str) -> JsonObject:
    """Return the measured adapters of one region, best first, under the names that `tenant` uses for them."""
    return {
        "region": ranking.anchor.name_for(tenant),
        "adapters": [
            {
                "name": item.ref.name_for(tenant),
                "score": item.score,
                "num_examples": item.num_examples,
                "is_beaten": item.is_beaten,
            }
            for item in ranking.adapters
        ],
    }
