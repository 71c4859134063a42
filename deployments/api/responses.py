"""Responses that report errors and changes of the pool, and the types of plans. They document the routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, NotRequired, Self

from typing_extensions import TypedDict

from deployments.api import error_table
from deployments.api.contract import AppliedContract
from deployments.api.draws_report import DrawsObject
from deployments.json_types import JsonObject
from lora_store import AdapterRef, Plan, Strategy, Trial, TrialVersion
from retriever_svc import Candidate, Route, RouteRequest

Decision = Literal["fits", "below_threshold", "no_candidates", "housekeeping"]


@dataclass(frozen=True, slots=True)
class TrialArm:
    """The version that a request got from a trial: the one under trial if it `is_chosen`, otherwise the live one."""

    version: TrialVersion
    is_chosen: bool

    @property
    def answering(self) -> AdapterRef:
        return self.version.ref if self.is_chosen else self.version.live


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and its candidates, the reason and the text that decided if the server chose."""

    plan: Plan
    candidates: tuple[Candidate, ...] = ()
    abstained: bool = False
    reason: Decision | None = None
    trials: tuple[TrialArm, ...] = ()
    shadow: Plan | None = None  # answers a copy of the request, and no client sees it
    tags: tuple[str, ...] = ()  # which the server's choice had to have
    policy: str | None = None  # the model name with the version of its policy
    contract: AppliedContract | None = None  # if an adapter that has one leads the plan
    text: str = ""

    @classmethod
    def from_route(cls, request: RouteRequest, route: Route) -> Self:
        """Return the Retriever's answer to this request as a plan with its reasons."""
        return cls(route.plan, route.candidates, route.abstained, route.reason, tags=request.tags, text=route.text)

    def drawn(self, key: str | None) -> Planned:
        """Return it with the versions that answer the request with this key; without a key, the live ones answer."""
        trials = self.plan.trials
        if not trials:
            return self
        drawn = [version for version in trials if key is not None and version.trial.includes(key)]
        shown = [version for version in drawn if not version.trial.is_shadow]
        hidden = [version for version in drawn if version.trial.is_shadow]
        plan = self.plan.with_versions(shown)
        arms = tuple(TrialArm(version, is_chosen=version in shown) for version in trials)
        return replace(self, plan=plan, trials=arms, shadow=plan.with_versions(hidden) if hidden else None)


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(TypedDict):
    """The error response of every route."""

    error: ErrorObject


class PlannedRow(TypedDict):
    name: str
    digest: str
    weight: float
    score: float | None


class CandidateRow(TypedDict):
    name: str
    digest: str
    score: float


class SampleRow(TypedDict):
    """The input of a sample, perhaps shortened, and its cosine to the prompt."""

    input: str
    score: float


class RoutedCandidate(CandidateRow):
    """A candidate for a prompt. It may answer if `score` reaches `threshold`, which depends on the prompt.

    `confidence`: the probability that it is the right adapter, estimated from the score and its lead over the others.
    `outcome`: what the tenant's outcomes for nearly the same prompts say in sum; below 0 it may not answer.
    `samples`: those nearest to the prompt, if `lora.explain` is set and the adapter belongs to the caller's tenant.
    """

    threshold: float
    confidence: float
    outcome: NotRequired[float]
    samples: NotRequired[list[SampleRow]]


class ContractApplied(TypedDict):
    """The adapter whose contract applies, and what it sets: `instruction`, `output_schema`, `stop`, `temperature`, …"""

    adapter: str
    applied: list[str]


class PlanObject(TypedDict):
    """The adapters that answered. A client can send it back as `lora.plan` to replay it.

    The optional fields are included if `lora.explain` requests them, and by `/v1/route`; `reason` and `why` only if the
    server chose, `policy` only for a model name: its version, `contract` only if an adapter's contract applies.
    `base_model`: the one that answers, of several.
    """

    strategy: Strategy
    adapters: list[PlannedRow]
    abstained: bool
    base_model: NotRequired[str]
    generation: NotRequired[int]
    candidates: NotRequired[list[RoutedCandidate]]
    reason: NotRequired[Decision]
    why: NotRequired[str]
    policy: NotRequired[str]
    contract: NotRequired[ContractApplied]


class RouteAnswer(TypedDict):
    object: Literal["list"]
    data: list[PlanObject]


def candidate_rows(candidates: Sequence[Candidate], tenant: str) -> list[CandidateRow]:
    return [{"name": c.ref.name_for(tenant), "digest": c.ref.digest, "score": c.score} for c in candidates]


@dataclass(frozen=True, slots=True)
class Published:
    """One live adapter. `ready` Retriever replicas route to it already, `behind` ones do not yet."""

    ref: AdapterRef
    generation: int
    ready: int
    behind: int
    found_by_auto: bool  # False: it has no samples, or none that the encoder in service embedded
    probe_shift: float | None
    neighbours: tuple[Candidate, ...]
    expires_at: datetime | None = None  # of an unlisted adapter
    trial: Trial | None = None  # of a version that is not live, but takes a share of the live one's requests
    kept: Mapping[str, object] = field(default_factory=dict)  # what it took over from the version that was live before
    changed: Mapping[str, FieldChange] = field(default_factory=dict)  # what differs from that version
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settled:
    """A committed change. `behind` Retriever replicas do not know it yet."""

    generation: int
    ready: int
    behind: int


class Replicas(TypedDict):
    """The numbers of Retriever replicas that know the change, and that do not yet."""

    ready: int
    behind: int


class TrialObject(TypedDict):
    """The version under trial, and its share of the requests to its name; with `shadow` it answers copies of them."""

    digest: str
    share: float
    shadow: bool


FieldChange = TypedDict("FieldChange", {"from": object, "to": object})
"""The value of the version that was live before, and the new one."""


class PublishedAdapter(TypedDict):
    """`kept` and `changed`: of `tags`, `template`, `contract`, `visibility` and the number of `samples` of a live name.

    `kept`: what was not given, so the live version's values apply. `changed`: what differs from them.
    """

    name: str
    digest: str
    generation: int
    replicas: Replicas
    found_by_auto: bool
    probe_shift: float | None
    neighbours: list[CandidateRow]
    expires_at: NotRequired[str]
    trial: NotRequired[TrialObject]
    kept: NotRequired[JsonObject]
    changed: NotRequired[JsonObject]
    warnings: NotRequired[list[str]]


class SettledAdapter(TypedDict):
    """An adapter whose visibility, approval or trial was changed, or a model name whose policy was."""

    name: str
    visibility: NotRequired[str]
    digest: NotRequired[str]
    approved: NotRequired[bool]
    draws: NotRequired[DrawsObject]
    trial: NotRequired[TrialObject | None]
    policy: NotRequired[JsonObject]
    generation: int
    replicas: Replicas


class SamplesChanged(TypedDict):
    """Proposals that were accepted or rejected, or accepted prompts that were taken out of the samples.

    `left_out`: prompts that are near-copies of a sample, or beyond a quarter of the samples. `digest`: of the live
    version, unless it was a rejection.
    """

    name: str
    action: Literal["accept", "reject", "undo"]
    left_out: NotRequired[list[str]]
    num_rejected: NotRequired[int]
    digest: NotRequired[str]
    generation: NotRequired[int]
    replicas: NotRequired[Replicas]


class BatchAnswer(TypedDict):
    """One object per adapter, with the status that it would have alone."""

    object: Literal["list"]
    data: list[JsonObject]


class RemovedAdapters(TypedDict):
    names: list[str]
    deleted: bool
    generation: int
    replicas: Replicas


def published_object(published: Published) -> PublishedAdapter:
    answer: PublishedAdapter = {
        "name": published.ref.name,
        "digest": published.ref.digest,
        "generation": published.generation,
        "replicas": replicas_object(published),
        "found_by_auto": published.found_by_auto,
        "probe_shift": published.probe_shift,
        "neighbours": candidate_rows(published.neighbours, published.ref.tenant),
    }
    if published.expires_at is not None:
        answer["expires_at"] = published.expires_at.isoformat()
    if published.trial is not None:
        answer["trial"] = trial_object(published.trial)
    if published.kept:
        answer["kept"] = dict(published.kept)
    if published.changed:
        answer["changed"] = dict(published.changed)
    if published.warnings:
        answer["warnings"] = list(published.warnings)
    return answer


def trial_object(trial: Trial) -> TrialObject:
    return {"digest": trial.digest, "share": trial.share, "shadow": trial.is_shadow}


def replicas_object(change: Published | Settled) -> Replicas:
    return {"ready": change.ready, "behind": change.behind}


def choose_status(published: Published) -> int:
    """Return 201, 202 while a Retriever replica does not route to it yet, or 200 if it was only validated."""
    return 202 if published.behind else 201 if published.generation else 200


def batch_object(outcomes: Sequence[Published | Exception]) -> BatchAnswer:
    """Return one object per adapter of a batch, in order: the answer and status that it would get alone."""
    data: list[JsonObject] = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            status, body = error_table.describe(outcome)
            data.append({"status": status, **body})
        else:
            data.append({"status": choose_status(outcome), **published_object(outcome)})
    return {"object": "list", "data": data}
