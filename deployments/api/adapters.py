"""Requests that publish and change adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from deployments.api.base import MAX_ADAPTERS, MAX_TEXT_CHARS, AdapterName, ApiRequest
from deployments.api.contract import Contract
from lora_store import LOCAL_TENANT, Edit, Sample, TenantQuota, Visibility
from lora_store.bounded_files import parse_json_object
from retriever_svc import AskedPrompt

MAX_UPLOAD_FILES = 64
MAX_BATCH = 256
MAX_DOCTOR_PROMPTS = 4_000  # with an adapter each, a body of more has too many JSON values
MAX_TAGS = 32
MAX_EDITED_SAMPLES = 10_000  # the Store refuses more than its limit with a better reason
MAX_TAG_CHARS = 256
MAX_TTL_S = 30 * 86_400
Tag = Annotated[str, Field(max_length=MAX_TAG_CHARS)]  # the Store checks the value
Name = Annotated[str, Field(min_length=1, max_length=129)]  # `name`, or `tenant/name`

_SOURCE = re.compile(r"[a-z0-9]+://|(?:runs|models):/")


@dataclass(frozen=True, slots=True)
class SentFile:
    """A large file of an upload that the Store has in parts, under this id."""

    id: str
    num_bytes: int

    def __len__(self) -> int:
        return self.num_bytes


@dataclass(frozen=True, slots=True)
class PublishItem:
    """A PEFT folder to publish, with its publisher's description. Exactly one of `path`, `files`, `source` is set.

    A new version of a live name keeps the tags, the template and the visibility that are None here, and the samples
    and the contract that its folder does not have.
    """

    path: Path | None = None
    name: str | None = None  # default: the last part of path or source
    tenant: str = LOCAL_TENANT
    tags: tuple[str, ...] | None = None
    template: str | None = None  # "server": the adapter names none
    contract: str | None = None  # JSON; "": none; None: the folder's, or else that of the live version
    files: Mapping[str, bytes | SentFile] | None = None
    source: str | None = None
    visibility: Visibility | None = None  # None: that of the live version, or for a new name `default_visibility`
    default_visibility: Visibility = "public"
    ttl_s: float | None = None  # of an unlisted adapter
    share: float | None = None  # of the live version's requests; None: the new version becomes the live one
    is_shadow: bool = False
    has_samples: bool = True  # False: it is published without any
    base_model: str | None = None  # that it was trained on; None: the one that its folder names
    quota: TenantQuota | None = None

    def __post_init__(self) -> None:
        given = [what for what in (self.path, self.files, self.source) if what is not None]
        if len(given) != 1:
            raise ValueError(f"an upload is one of path, files and source, got {len(given)} of them")

    @property
    def sent(self) -> list[str]:
        """The ids of its files that were sent in parts."""
        return [file.id for file in (self.files or {}).values() if isinstance(file, SentFile)]

    @property
    def adapter_name(self) -> str:
        """The name to publish under; "" for files without a name, which validation refuses."""
        if self.name is not None:
            return self.name
        return _find_name(self.source or "") if self.path is None else self.path.name


def _find_name(source: str) -> str:
    """Return the last part of a URI, for `models:/NAME/…` the model's name. Without the revision of either."""
    if source.startswith("models:/"):
        return source.removeprefix("models:/").partition("/")[0].partition("@")[0]
    whole = source.rstrip("/")
    last = whole.rpartition("/")[2]
    is_repository = whole.startswith("hf://") and whole.count("/") == 3  # hf://owner/repository@revision
    return last.partition("@")[0] if is_repository else last


def _as_object(value: object) -> object:
    """Return the object of a form's field, whose text is JSON; an empty text is an empty object."""
    return parse_json_object(value or "{}") if isinstance(value, str) else value


_CONTRACT_SCHEMA = {"type": "object", "maxProperties": len(Contract.model_fields)}


class AdapterLabel(ApiRequest):
    """The description that a publisher may send with the files.

    A new version of a live name keeps the tags, the template, the contract, the visibility and the samples that are not
    given.
    """

    name: str | None = Field(default=None, max_length=64)
    tags: list[Tag] | None = Field(fail_fast=True, default=None, max_length=MAX_TAGS)  # []: none
    template: Literal["alpaca", "chat", "server"] | None = None  # "server": the adapter names none
    # {}: none. It comes instead of the folder's.
    contract: Annotated[Contract | None, BeforeValidator(_as_object), WithJsonSchema(_CONTRACT_SCHEMA)] = None
    # []: none, so that only its name finds it. Samples come as a file of the folder.
    samples: list[Tag] | None = Field(default=None, max_length=0)
    visibility: Visibility | None = None  # None: that of the live version; for a new name the server's default
    # Seconds after which the adapter is withdrawn. It is unlisted until then: only its name finds it.
    ttl_s: float | None = Field(default=None, ge=1, le=MAX_TTL_S, allow_inf_nan=False)
    # The live version stays, and this one answers a share of the requests to its name, or with `shadow` a copy of them.
    share: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    shadow: bool = False
    # The accepted base model that it was trained on, instead of the name in its folder. Shapes are checked as always.
    base_model: str | None = Field(default=None, min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _shadow_has_a_share(self) -> Self:
        if self.shadow and self.share is None:
            raise ValueError("`shadow` needs a `share`: 1 for a copy of every request")
        return self

    @model_validator(mode="after")
    def _share_keeps_the_live_settings(self) -> Self:
        for field in ("visibility", "ttl_s"):
            if self.share is not None and getattr(self, field) is not None:
                raise ValueError(f"`{field}` cannot be combined with `share`: the live version's applies")
        return self

    def item(
        self,
        *,
        path: Path | None = None,
        files: Mapping[str, bytes | SentFile] | None = None,
        source: str | None = None,
    ) -> PublishItem:
        """Return the adapter at this place with this description."""
        return PublishItem(
            path,
            self.name,
            tags=None if self.tags is None else tuple(self.tags),
            template=self.template,
            contract=None if self.contract is None else self.contract.to_json(),
            files=files,
            source=source,
            visibility=self.visibility,
            ttl_s=self.ttl_s,
            share=self.share,
            is_shadow=self.shadow,
            has_samples=self.samples is None,
            base_model=self.base_model,
        )


class AdapterSource(AdapterLabel):
    """One adapter to publish: a folder of the server's own file system, or a URI below an allowed prefix."""

    path: str | None = Field(default=None, min_length=1, max_length=4096)
    source: str | None = Field(default=None, min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.source is None):
            raise ValueError("exactly one of `path` and `source` says where the adapter is")
        return self

    def upload(self) -> PublishItem:
        return self.item(path=None if self.path is None else Path(self.path), source=self.source)


class PublishBatch(ApiRequest):
    """`POST /v1/loras`: many adapters in one commit."""

    adapters: Annotated[list[AdapterSource], Field(fail_fast=True, min_length=1, max_length=MAX_BATCH)]


class RollbackRequest(ApiRequest):
    """`POST /v1/loras/{name}/rollback`: to the previous version, or the kept one whose digest starts with `digest`."""

    digest: str | None = Field(default=None, min_length=8, max_length=64)


class SamplesRequest(ApiRequest):
    """`POST /v1/loras/{name}/samples`: accept or reject proposed prompts, or undo: take every accepted prompt out.

    `ids`: of the proposals; None: all that wait.
    """

    action: Literal["accept", "reject", "undo"]
    ids: list[Annotated[str, Field(max_length=64)]] | None = Field(default=None, min_length=1, max_length=MAX_BATCH)

    @model_validator(mode="after")
    def _undo_takes_no_ids(self) -> Self:
        if self.action == "undo" and self.ids is not None:
            raise ValueError("`ids` cannot be combined with `undo`, which takes every accepted prompt out")
        return self


class OutcomeRequest(ApiRequest):
    """`POST /v1/outcomes`: how well an adapter answered a request to `auto`, or None: the base model.

    `request_id`: the `x-request-id` of the answer. A later outcome of the same request replaces the earlier one, and a
    score of 0 withdraws it.
    """

    request_id: str = Field(min_length=1, max_length=256)
    adapter: Name | None = None
    score: float = Field(ge=-1, le=1, allow_inf_nan=False)


class ShareRequest(ApiRequest):
    """`POST /v1/loras/{name}/share`: a kept version answers a share of the requests that name no version; 0 ends that.

    `digest`: of the version, or its beginning; None: the one under trial.
    """

    share: float = Field(ge=0, le=1, allow_inf_nan=False)
    digest: str | None = Field(default=None, min_length=8, max_length=64)
    shadow: bool = False


class EditedSample(ApiRequest):
    """A sample of an adapter, as a line of `lora_samples.jsonl` has it."""

    input: str = Field(min_length=1, max_length=MAX_TEXT_CHARS)
    output: str | None = Field(default=None, max_length=MAX_TEXT_CHARS)


class EditRequest(ApiRequest):
    """`PATCH /v1/loras/{name}`: change what is given, without an upload.

    `visibility` applies to the live version; `private` also applies to the older versions. Every other field makes a
    new version with the same weights. `samples` replaces all samples. `digest` names the version that was edited: if
    another version is live, nothing changes.
    """

    visibility: Visibility | None = None
    tags: list[Tag] | None = Field(fail_fast=True, default=None, max_length=MAX_TAGS)  # []: none
    template: Literal["alpaca", "chat", "server"] | None = None  # "server": the adapter names none
    samples: list[EditedSample] | None = Field(fail_fast=True, default=None, max_length=MAX_EDITED_SAMPLES)
    contract: Contract | None = None  # {}: none
    digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.visibility is None and not self.makes_version:
            raise ValueError(
                "at least one of `visibility`, `tags`, `template`, `samples` and `contract` says what to change"
            )
        return self

    @property
    def makes_version(self) -> bool:
        """Whether it makes a new version."""
        return any(given is not None for given in (self.tags, self.template, self.samples, self.contract))

    def edit(self) -> Edit:
        """Return the changes. Raises: RequestInvalid for a contract that JSON cannot hold."""
        return Edit(
            tags=None if self.tags is None else tuple(self.tags),
            template=self.template,
            visibility=self.visibility,
            samples=None if self.samples is None else tuple(Sample(item.input, item.output) for item in self.samples),
            contract=None if self.contract is None else self.contract.to_json(),
        )


class ApproveRequest(ApiRequest):
    """`POST /v1/loras/{name}/approve`: the live version, which must be the one that was reviewed.

    The whole digest is required: a publisher could search for another version whose digest starts in the same way.
    """

    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="the whole `digest` that GET /v1/loras/{name} shows")
    confirmed: bool = Field(
        default=False, description="also if the version would draw many ordinary prompts, or prompts of other adapters"
    )


class LoadAdapterRequest(ApiRequest):
    """vLLM's `POST /v1/load_lora_adapter`. `lora_path`: a folder of the server, or a URI below an allowed prefix."""

    lora_name: str = Field(min_length=1, max_length=64)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False  # for stacked experts, which are found by the names of their tensors

    def upload(self) -> PublishItem:
        if _SOURCE.match(self.lora_path):
            return PublishItem(name=self.lora_name, source=self.lora_path)
        return PublishItem(Path(self.lora_path), self.lora_name)


class UnloadAdapterRequest(ApiRequest):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: int | None = None  # vLLM's number for the adapter, which its clients send too


class JobRequest(ApiRequest):
    """`POST /v1/pool/verify` and `/evaluate`: an empty object, so that no HTML form can start a job."""


class DoctorPrompt(ApiRequest):
    """A prompt of a client. `adapters`: those that should answer it, [] for the base model; unset: unknown."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT_CHARS)
    adapters: list[AdapterName] | None = Field(fail_fast=True, default=None, max_length=MAX_ADAPTERS)

    def asked(self) -> AskedPrompt:
        return AskedPrompt(self.prompt, None if self.adapters is None else tuple(self.adapters))


class DoctorRequest(JobRequest):
    """`POST /v1/pool/doctor`. `prompts`: real ones, to count which adapters answer them."""

    prompts: list[DoctorPrompt] = Field(fail_fast=True, default=[], max_length=MAX_DOCTOR_PROMPTS)


class GcRequest(ApiRequest):
    """`POST /v1/pool/gc`"""

    retention_s: float = Field(default=86_400, ge=0, le=10 * 365 * 86_400)


class ReindexRequest(ApiRequest):
    """`POST /v1/pool/reindex`: a sentence-transformers model, as `retrieval.encoder` names it, and its projection.

    `projection`: `auto` is the packaged one, if there is one; `refit` fits one to the samples of the pool.
    """

    encoder: str = Field(min_length=1, max_length=4096)
    projection: Literal["auto", "none", "refit"] = "auto"
