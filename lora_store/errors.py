"""Errors of the adapter store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_store.adapter import AdapterRef
from lora_store.error_kinds import RETRY_LATER, Kind, ReportedError


class LoraStoreError(ReportedError):
    """Base class of the errors of `lora_store`."""


class AdapterRefused(LoraStoreError):
    """The folder is not a valid adapter for this base model. The message lists every reason."""

    kind = Kind.INVALID
    code = "adapter_refused"
    remedy = (
        "Correct every reason and publish again. `loraretriever publish --dry-run --config FILE` finds most of"
        " them without a server."
    )

    def __init__(self, name: str, reasons: Sequence[str]) -> None:
        super().__init__(name, tuple(reasons))
        self.name = name
        self.reasons = tuple(reasons)

    def __str__(self) -> str:
        return f"adapter {self.name!r} refused: " + "; ".join(self.reasons)


class PublicNameTaken(AdapterRefused):
    """Another tenant's public adapter has this name, or a model name is the same."""

    kind = Kind.CONFLICT
    code = "name_taken"
    remedy = (
        "Publish under another name. A private adapter may have another tenant's name, but not one of your own model"
        " names."
    )


@dataclass(eq=False)
class NameTaken(LoraStoreError):
    """An adapter, the base model or another tenant's approved model name is called like the model name."""

    kind = Kind.CONFLICT
    code = "name_taken"
    remedy = "Choose another model name."
    text = "name: {self.owner} is called {self.name!r} already; choose another name"

    name: str
    owner: str


@dataclass(eq=False)
class QuotaExceeded(LoraStoreError):
    """The tenant would exceed the key's `max_adapters` or `max_bytes`, or have more than 256 model names."""

    kind = Kind.FORBIDDEN
    code = "quota_exceeded"
    remedy = "Withdraw adapters, or ask the operator for a larger quota. Model names have no larger one: remove some."
    text = (
        "quota exceeded: the tenant may have {self.limit} {self.what}, and this would make it {self.wanted};"
        " {self.advice}"
    )

    what: str
    wanted: int
    limit: int
    advice: str = "withdraw adapters first, or ask for a larger quota"


class FileRefused(LoraStoreError):
    """One file of a folder cannot be read safely or has invalid content. It becomes a reason of AdapterRefused."""

    def __init__(self, file: str, problems: Sequence[str]) -> None:
        super().__init__(file, tuple(problems))
        self.file = file
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "; ".join(f"{self.file}: {problem}" for problem in self.problems)


@dataclass(eq=False)
class AdapterNotFound(LoraStoreError):
    """The adapter does not exist or is not visible to the caller, or no blob has this digest.

    `hint`: the name that was probably meant, or "". `owner`: the other tenant that has the adapter which was to be
    changed, or "".
    """

    kind = Kind.MISSING
    code = "model_not_found"
    remedy = "List what exists: `loraretriever list`, or `GET /v1/models`."

    wanted: str
    hint: str = field(default_factory=str)  # no attribute of the class, which would hide that of Ray's error's cause
    owner: str = field(default_factory=str)

    def __str__(self) -> str:
        if self.owner:
            return f"{self.wanted!r} belongs to tenant {self.owner!r}; only its own keys may change it"
        return f"no adapter {self.wanted!r}" + (f"; did you mean {self.hint!r}?" if self.hint else "")


@dataclass(eq=False)
class BlobCorrupted(LoraStoreError):
    """Stored weights do not match their digest."""

    kind = Kind.BROKEN
    code = "store_damaged"
    remedy = "Publish the adapter again. `loraretriever pool verify --store STORE` lists all such files."
    text = "blob {self.digest} is corrupted: its bytes hash to {self.found}; publish the adapter again"

    digest: str
    found: str


class PlanInvalid(LoraStoreError):
    """`lora.plan` cannot be computed."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Send a plan exactly as the server returned it."


@dataclass(eq=False)
class VersionConflict(LoraStoreError):
    """Other writers of the store committed first at every attempt."""

    kind = Kind.BUSY
    code = "overloaded"
    remedy = RETRY_LATER

    attempts: int

    def __str__(self) -> str:
        times = "" if self.attempts == 1 else f", {self.attempts} times in a row"
        return f"another writer committed first{times}; retry later"


@dataclass(eq=False)
class GenerationGone(LoraStoreError):
    """The events up to that generation were folded and their files deleted. The newest generation can be read."""

    text = "generation {self.generation} of the pool is no longer stored; the newest is {self.newest}"

    generation: int
    newest: int


@dataclass(eq=False)
class ConditionalWritesMissing(LoraStoreError):
    """Two writers of this S3 endpoint could overwrite each other, because it accepts a write that must fail."""

    text = (
        "store_uri: the S3 endpoint ignores If-None-Match: it answered two conditional writes of one new object"
        " with {self.first} and {self.second}, but the second must be 412. Two writers could overwrite each"
        " other's changes of the pool. Use an endpoint that honours conditional writes, or a folder"
    )

    first: int
    second: int


@dataclass(eq=False)
class StoreUnavailable(LoraStoreError):
    """The store cannot be reached. Nothing is lost.

    The text is for the log: it may contain buckets, endpoints and paths. `client_message` contains none of them.
    """

    kind = Kind.UNAVAILABLE
    code = "store_unavailable"
    remedy = RETRY_LATER
    text = "the adapter store cannot be reached: {self.cause}"
    client_message = "the adapter store cannot be reached; nothing is lost, try again later"

    cause: str


class StoreFull(StoreUnavailable):
    """The store's disk is full. Nothing is lost."""

    remedy = (
        "Retry once the operator has freed space. `loraretriever withdraw` and `loraretriever pool gc` work on a full"
        " disk."
    )
    text = (
        "the store's disk is full: {self.cause}; free space with `loraretriever withdraw` and `loraretriever"
        " pool gc`, or enlarge the disk"
    )
    client_message = "the store's disk is full; nothing is lost, try again once the operator has freed space"


class StoreDamaged(LoraStoreError):
    """A file of the catalogue is missing or unreadable. The server's log names it.

    The text is for the log and the operator: it names the file. `client_message` does not.
    """

    kind = Kind.BROKEN
    code = "store_damaged"
    remedy = (
        "The operator stops the server and runs `loraretriever pool repair --store URI`, with the `store_uri` of the"
        " settings. A retry does not help."
    )
    text = "the adapter store is damaged: {self.file} {self.problem}; {self.action}"
    client_message = "the adapter store is damaged, and its operator has to repair it; the server's log names the file"

    def __init__(self, file: str, problem: str, remedy: str = "") -> None:
        super().__init__(file, problem, remedy)
        self.file = file
        self.problem = problem
        self.action = (
            remedy or "stop every server of this store and run `loraretriever pool repair --store URI` with its URI"
        )


@dataclass(eq=False)
class StoreIsNewer(LoraStoreError):
    """A newer release changed the store, and this one would damage it."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = "The message names the release that can. Retry once the server is upgraded."

    refused: str
    release: str

    def __str__(self) -> str:
        needed = f"release {self.release} or later" if self.release else "the release that changed it, or a later one"
        return f"this release cannot {self.refused}: a newer one changed the store. Use {needed}"


class EncoderIncomplete(LoraStoreError):
    """Adapters of the pool have no embedding by the encoder that is to be activated."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = "Run `loraretriever pool reindex` again."

    def __init__(self, missing: Sequence[AdapterRef]) -> None:
        super().__init__(tuple(missing))
        self.missing = tuple(missing)

    def __str__(self) -> str:
        some = ", ".join(ref.short_digest for ref in self.missing[:3])  # names are visible to their tenants only
        return f"{len(self.missing)} live adapters have no embedding by this encoder, such as {some}; embed them first"
