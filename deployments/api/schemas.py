"""What the routes answer, as the OpenAPI document tells it; `answers` and `openai_answers` make the objects."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Digest = str
ListKind = Literal["list"]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every error of every route."""

    error: ErrorObject


class PlannedRow(BaseModel):
    name: str
    digest: Digest
    weight: float
    score: float | None


class CandidateRow(BaseModel):
    name: str
    digest: Digest
    score: float


class PlanObject(BaseModel):
    """Who answered. Sent back as `lora.plan`, it is replayed. The last two where `lora.explain` asks, and of routes."""

    strategy: Literal["base", "selection", "mixture", "fusion"]
    adapters: list[PlannedRow]
    abstained: bool
    generation: int = 0
    candidates: list[CandidateRow] = []


class RouteAnswer(BaseModel):
    object: ListKind
    data: list[PlanObject]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"]
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class TextChoice(BaseModel):
    """`lora`: the plan of this choice's prompt, where the request has several."""

    index: int
    finish_reason: Literal["stop", "length"]
    text: str
    logprobs: TextLogprobs | None
    lora: PlanObject | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    lora: PlanObject


class TextAnswer(BaseModel):
    """`lora`: the plan, where the request has one prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    lora: PlanObject | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(BaseModel):
    object: ListKind
    data: list[ModelCard]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Adapter(BaseModel):
    """`id`: the name the caller asks for it by: `name`, or `tenant/name` of another tenant's."""

    id: str
    name: str
    tenant: str
    digest: Digest
    weights_digest: Digest
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
    created_at: str
    generation: int


class AdapterList(BaseModel):
    object: ListKind
    generation: int
    total: int
    data: list[Adapter]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AdapterVersion(BaseModel):
    digest: Digest
    state: Literal["live", "kept"]
    generation: int
    created_at: str
    source: str
    actor: str


class AdapterShown(Adapter):
    versions: list[AdapterVersion]
    catalogue_generation: int


class Replicas(BaseModel):
    """Retriever replicas that know of the change, and those that do not yet."""

    ready: int
    behind: int


class PublishedAdapter(BaseModel):
    name: str
    digest: Digest
    generation: int
    replicas: Replicas
    found_by_auto: bool
    probe_shift: float | None
    neighbours: list[CandidateRow]


class SettledAdapter(BaseModel):
    """An adapter whose visibility or approval was settled."""

    name: str
    visibility: str | None = None
    digest: Digest | None = None
    approved: bool | None = None
    generation: int
    replicas: Replicas


class BatchAnswer(BaseModel):
    """One object an adapter, with the status it would have had alone."""

    object: ListKind
    data: list[dict[str, Any]]


class RemovedAdapters(BaseModel):
    names: list[str]
    deleted: bool
    generation: int
    replicas: Replicas


class CollectedBlobs(BaseModel):
    num_blobs: int
    num_bytes: int


class Health(BaseModel):
    status: Literal["ok"]


class Ready(BaseModel):
    """With keys the status alone. `refused`: adapters of the preload that were not published, with the reason."""

    status: Literal["ready"]
    generation: int | None = None
    num_adapters: int | None = None
    refused: dict[str, str] | None = None


class MapPoint(BaseModel):
    name: str
    x: float
    y: float


class PlanePoint(BaseModel):
    x: float
    y: float


class PoolPicture(BaseModel):
    object: Literal["pool_map"]
    generation: int
    num_adapters: int
    shown_variance: float
    points: list[MapPoint]


class PromptPlace(BaseModel):
    object: Literal["pool_place"]
    generation: int
    prompt: PlanePoint
    adapters: list[MapPoint]


class Stats(BaseModel):
    """Sums over the replicas that answered. Counters rise until a replica is replaced.

    `tenant`: the caller's own rows and tokens; `workers`: those of all tenants, null unless the caller is an admin.
    """

    object: Literal["stats"]
    read_at: float
    base_model: str
    defaults: dict[str, Any]
    pool: dict[str, Any]
    tenant: dict[str, Any]
    workers: dict[str, Any] | None
