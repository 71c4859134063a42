"""Response objects: plans, and what is told of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.api import error_table
from deployments.api.change_results import Published, Removed, Settled
from deployments.api.planned import Planned
from lora_store import AdapterRecord, AdapterRef
from retriever_svc import Candidate, DoctorReport

JsonObject = dict[str, Any]


def list_object(data: Sequence[JsonObject], *, has_more: bool) -> JsonObject:
    """One page of a list, as the OpenAI API has it: go on `after` the `last_id` while there is more."""
    ids = [item["id"] for item in data]
    edges = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": data, **edges, "has_more": has_more}


def plan_object(planned: Planned, tenant: str, *, explain: bool) -> JsonObject:
    """Strategy and adapters always; every candidate and its score where the client asked.

    Adapters are told by the names `tenant` asks for them by.
    """
    plan = planned.plan
    adapters = [
        {"name": row.ref.name_for(tenant), "digest": row.ref.digest, "weight": row.weight, "score": row.score}
        for row in plan.adapters
    ]
    report: JsonObject = {"strategy": plan.strategy, "adapters": adapters, "abstained": planned.abstained}
    if explain:
        report |= {"generation": plan.generation, "candidates": candidate_objects(planned.candidates, tenant)}
    return report


def candidate_objects(candidates: Sequence[Candidate], tenant: str) -> list[JsonObject]:
    return [{"name": c.ref.name_for(tenant), "digest": c.ref.digest, "score": c.score} for c in candidates]


def lora_object(record: AdapterRecord, tenant: str) -> JsonObject:
    """One adapter of the pool. `id`: the name `tenant` asks for it by."""
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
        "found_by_auto": record.num_samples > 0,
        "probe_shift": record.probe_shift,
        "source": record.source,
        "created_at": record.created_at.isoformat(),
        "generation": record.generation,
    }


def versions_object(versions: Sequence[AdapterRecord]) -> list[JsonObject]:
    """The kept versions of one name, the live one first."""
    return [
        {
            "digest": record.ref.digest,
            "state": "kept" if place else "live",
            "generation": record.generation,
            "created_at": record.created_at.isoformat(),
            "source": record.source,
            "actor": record.actor,
        }
        for place, record in enumerate(versions)
    ]


def published_object(published: Published) -> JsonObject:
    return {
        "name": published.ref.name,
        "digest": published.ref.digest,
        "generation": published.generation,
        "replicas": {"ready": published.ready, "behind": published.behind},
        "found_by_auto": published.found_by_auto,
        "probe_shift": published.probe_shift,
        "neighbours": candidate_objects(published.neighbours, published.ref.tenant),
    }


def status_of(published: Published) -> int:
    """201, or 202 while a Retriever replica does not route to it yet."""
    return 202 if published.behind else 201


def batch_object(outcomes: Sequence[Published | Exception]) -> JsonObject:
    """One object per adapter of a batch, in order: as it would be answered alone, with its status."""
    data: list[JsonObject] = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            status, body = error_table.describe(outcome)
            data.append({"status": status} | body)
        else:
            data.append({"status": status_of(outcome)} | published_object(outcome))
    return {"object": "list", "data": data}


def settled_object(settled: Settled) -> JsonObject:
    return {"generation": settled.generation, "replicas": {"ready": settled.ready, "behind": settled.behind}}


def removed_object(removed: Removed) -> JsonObject:
    return {
        "names": list(removed.names),
        "deleted": True,
        "generation": removed.generation,
        "replicas": {"ready": removed.ready, "behind": removed.behind},
    }


def doctor_object(report: DoctorReport, tenant: str) -> JsonObject:
    """How an adapter's own samples find it. Their shares are better than those of prompts it never saw."""

    def name(ref: AdapterRef) -> str:
        return ref.name_for(tenant)

    return {
        "generation": report.generation,
        "k": report.top_k,
        "num_adapters": len(report.adapters),
        "num_samples": sum(finding.num_samples for finding in report.adapters),
        "first_share": report.share_first,
        "found_share": report.share_found,
        "collisions": [
            {
                "adapters": [name(collision.first), name(collision.second)],
                "cosine": collision.cosine,
                "num_swapped": [collision.num_of_first, collision.num_of_second],
            }
            for collision in report.collisions
        ],
        "never_chosen": list(map(name, report.never_chosen)),
        "always_shadowed": [
            {"name": name(finding.ref), "by": name(finding.shadowed_by)}
            for finding in report.always_shadowed
            if finding.shadowed_by is not None
        ],
        "unreadable": list(map(name, report.unreadable)),
    }
