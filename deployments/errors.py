"""Errors of the API itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_store.error_kinds import RETRY_LATER, FieldError, Kind, ReportedError


class DeploymentsError(ReportedError):
    """Base class of the errors of the API itself."""


class RequestInvalid(DeploymentsError, FieldError):
    """A field is unknown, missing or out of its range. `param` names it."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Correct that field."


class Unsupported(DeploymentsError):
    """The field is part of the OpenAI API, and this server does not serve it.

    `what`: the unsupported use of it, and after a colon what to do instead.
    """

    kind = Kind.INVALID
    code = "unsupported"
    remedy = "Leave it out. [Refused fields](http-api.md#refused-fields) lists such fields."

    def __init__(self, param: str, what: str) -> None:
        super().__init__(param, what)
        self.param = param
        self.what = what

    def __str__(self) -> str:
        what, _, remedy = self.what.partition(": ")
        return f"{self.param}: this server does not support {what} yet; {remedy or 'leave it out'}"


class ResponseNotStored(DeploymentsError):
    """A request to `/v1/responses` continues an earlier response, and the server stores none."""

    kind = Kind.INVALID
    code = "previous_response_not_found"
    remedy = "Send the whole conversation in `input`, as clients do that know this code."
    param = "previous_response_id"
    text = "{self.param}: this server stores no responses; send the whole conversation in input"


class KeyRefused(DeploymentsError):
    """The key is missing, unknown or expired."""

    kind = Kind.UNAUTHENTICATED
    code = "invalid_api_key"
    remedy = "Send `Authorization: Bearer KEY` with a valid key. Ask the operator for a new one if it has expired."


class KeysUnavailable(DeploymentsError):
    """The keys file has been missing for longer than five minutes."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = "The operator restores the file."


@dataclass(eq=False)
class RoleMissing(DeploymentsError):
    """The key lacks the role that this call needs."""

    kind = Kind.FORBIDDEN
    code = "permission_denied"
    remedy = "Use a key with that role."
    text = "this operation needs the role {self.role!r}, which the key {self.key_id!r} does not have"

    key_id: str
    role: str


@dataclass(eq=False)
class SelfApproval(DeploymentsError):
    """An admin tried to approve an adapter of its own tenant."""

    kind = Kind.FORBIDDEN
    code = "permission_denied"
    remedy = "Ask another tenant's admin, or set `allow_self_approval`."
    text = (
        "the adapter {self.name!r} belongs to the key's own tenant {self.tenant!r}: "
        "ask an admin of another tenant to approve it, or set allow_self_approval on the server"
    )

    name: str
    tenant: str


@dataclass(eq=False)
class RateLimited(DeploymentsError):
    """A limit of the key is used up."""

    kind = Kind.LIMITED
    code = "rate_limit_exceeded"
    remedy = RETRY_LATER
    text = "the key's limit of {self.limit} is exceeded; retry in {self.retry_after_s:.1f} s"

    limit: str
    retry_after_s: float


@dataclass(eq=False)
class ModelNotFound(DeploymentsError):
    """`model` does not exist or is not visible to the caller.

    `hint`: a similar name, or "". `is_policy`: it was asked for where only model names are.
    """

    kind = Kind.MISSING
    code = "model_not_found"
    remedy = "Use `auto`, the base model, or an adapter that `GET /v1/models` lists."
    param = "model"

    model: str
    hint: str = field(default_factory=str)  # as in AdapterNotFound
    is_policy: bool = field(default=False)

    def __str__(self) -> str:
        if self.is_policy:
            return (
                f"no model name {self.model!r}; `loraretriever name list` and GET /v1/names show those that there are"
            )
        hint = (
            f"; did you mean {self.hint!r}?"
            if self.hint
            else "; use 'auto', or a name of `loraretriever list` or GET /v1/models"
        )
        return f"no model or adapter {self.model!r}{hint}"


class VersionNotKept(DeploymentsError):
    """No kept version of the adapter or model name has this digest.

    `wanted`: the digest, or None for the version before the live one. `what`: the thing that has the name.
    """

    kind = Kind.MISSING
    code = "version_not_found"
    remedy = "`loraretriever show NAME` lists the kept versions, or `loraretriever name list NAME` for a model name."
    param = "digest"

    def __init__(self, name: str, wanted: str | None, kept: Sequence[str], what: str = "adapter") -> None:
        super().__init__(name, wanted, tuple(kept), what)
        self.name = name
        self.wanted = wanted
        self.kept = tuple(kept)
        self.what = what

    def __str__(self) -> str:
        wanted = "older version" if self.wanted is None else f"version {self.wanted!r}"
        return f"{self.what} {self.name!r} has no {wanted}; it has {', '.join(digest[:12] for digest in self.kept)}"


class NoTrial(VersionNotKept):
    """No version of the adapter is under trial, and the request names none."""

    remedy = "Name a kept version that is not live, or publish a new one with a share."

    def __init__(self, name: str, kept: Sequence[str]) -> None:
        super().__init__(name, None, kept)
        self.args = (name, self.kept)

    def __str__(self) -> str:
        start = f"digest: no version of {self.name!r} is under trial"
        if not self.kept:
            return f"{start}, and only the live one is kept; publish a new version with a share"
        return f"{start}; name one of the kept versions: {', '.join(digest[:12] for digest in self.kept)}"


@dataclass(eq=False)
class RequestNotKept(DeploymentsError):
    """An outcome names a request that the server does not keep, or that another tenant sent."""

    kind = Kind.MISSING
    code = "request_not_kept"
    remedy = (
        "Send the `x-request-id` of a request to `auto` with a single user turn, at most a day old, to a server with"
        " `learning` set to `observe` or `apply`."
    )
    param = "request_id"

    request_id: str

    def __str__(self) -> str:
        return (
            f"request_id: no request {self.request_id[:200]!r} of yours is kept; send the x-request-id of a request to"
            " 'auto' with a single user turn, at most a day old, to a server with the setting learning: observe or"
            " apply"
        )


@dataclass(eq=False)
class VersionChanged(DeploymentsError):
    """Another version is live than the one whose digest the request names."""

    kind = Kind.CONFLICT
    code = "version_changed"
    remedy = "Look at the live version, then name its digest."
    param = "digest"
    text = (
        "digest: {self.wanted!r} is not the live version of adapter {self.name!r}; "
        "review {self.live!r}, then name that digest"
    )

    name: str
    wanted: str
    live: str


@dataclass(eq=False)
class AdapterExists(DeploymentsError):
    """vLLM's load call names an adapter that is already live."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Unload it first, or set `load_inplace`."
    text = "the LoRA adapter {self.name!r} has already been loaded; set load_inplace to replace it"

    name: str


@dataclass(eq=False)
class HostRefused(DeploymentsError):
    """Without keys, `Host` must be a loopback name, an IP address, or listed in `allowed_hosts`."""

    kind = Kind.WRONG_HOST
    code = "permission_denied"
    remedy = "Use such an address, or add the name to `allowed_hosts`."

    host: str

    def __str__(self) -> str:
        given = f"the Host header {self.host!r} is" if self.host else "a missing or repeated Host header is"
        return f"{given} not allowed: use localhost, an IP address, or a name listed in allowed_hosts"


@dataclass(eq=False)
class OriginRefused(DeploymentsError):
    """Without keys, pages of other origins may not send requests unless `cors_origins` lists them."""

    kind = Kind.FORBIDDEN
    code = "permission_denied"
    remedy = "Add the origin to `cors_origins`, serve the page from this server's own origin, or use keys."
    text = (
        "web pages of {self.origin!r} must not call this server; only its own, those of this machine, and those that"
        " cors_origins lists may"
    )

    origin: str


class PublishingDisabled(DeploymentsError):
    """This client may not change the pool, publish a folder of the server (`path`), or reindex with this encoder."""

    kind = Kind.FORBIDDEN
    code = "permission_denied"
    remedy = (
        "Without keys, do it on the server's machine. For a `path`, upload the files instead. For a reindex with keys,"
        " add the encoder to `encoders`. See [keys and tenants](../how-to/keys-and-tenants.md#who-may-publish)."
    )


@dataclass(eq=False)
class SourceRefused(DeploymentsError):
    """The source URI is not below one of the tenant's `source_prefixes`."""

    kind = Kind.FORBIDDEN
    code = "permission_denied"
    remedy = "Publish from such a place, or ask the operator to add a prefix."

    source: str
    reason: str

    def __str__(self) -> str:
        return f"the source {self.source[:200]!r} {self.reason}"


@dataclass(eq=False)
class SourceMissing(DeploymentsError):
    """No adapter is at that path or URI."""

    kind = Kind.MISSING
    code = "adapter_refused"
    remedy = "Name the folder that holds `adapter_config.json`."

    place: str

    def __str__(self) -> str:
        return f"no adapter at {self.place[:200]!r}: give a folder that contains adapter_config.json"


@dataclass(eq=False)
class SourceUnavailable(DeploymentsError):
    """The source does not answer.

    The text is for the log, because it may quote endpoints and paths. `client_message` quotes the client only.
    """

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = "Retry after `Retry-After` seconds. The server's log says why."

    source: str
    cause: str

    def __str__(self) -> str:
        return f"the source {self.source[:200]!r} cannot be read: {self.cause[:500]}"

    @property
    def client_message(self) -> str:
        return f"the source {self.source[:200]!r} cannot be read; retry later, or ask the operator of the server"


class BodyNotAllowed(DeploymentsError):
    """The request's method takes no body, and it has one."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Send the request without a body."


class BodyTooLarge(DeploymentsError):
    """The body exceeds 4 MiB, or an upload exceeds `admission.max_weights_bytes` and 16 MiB."""

    kind = Kind.TOO_LARGE
    code = "body_too_large"
    remedy = "Send less, for example fewer prompts in one request. For an upload, raise `admission.max_weights_bytes`."


class BodyTooSlow(DeploymentsError):
    """The body did not arrive in time."""

    kind = Kind.TOO_SLOW
    code = "request_too_slow"
    remedy = "Send it again over a faster connection."


@dataclass(eq=False)
class BodyMemoryFull(DeploymentsError):
    """Request bodies in memory would exceed 256 MiB."""

    kind = Kind.BUSY
    code = "overloaded"
    remedy = RETRY_LATER
    text = "request bodies in memory would exceed {self.max_bytes} bytes; retry later"

    max_bytes: int


@dataclass(eq=False)
class UploadMemoryFull(DeploymentsError):
    """Uploads in progress leave no room for this one (`max_upload_total_bytes`)."""

    kind = Kind.BUSY
    code = "overloaded"
    remedy = RETRY_LATER
    text = "uploads in progress would exceed {self.max_bytes} bytes; retry later"

    max_bytes: int


class UploadDiskFull(DeploymentsError):
    """The server has no disk space for uploads below `TMPDIR`."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = "Retry once the operator has freed space."
    text = "the server has no disk space for uploads below TMPDIR; retry later"


@dataclass(eq=False)
class ServerOverloaded(DeploymentsError):
    """An Ingress replica works on `max_concurrent_requests` requests."""

    kind = Kind.FULL
    code = "overloaded"
    remedy = RETRY_LATER
    text = "the server is at its limit of {self.limit} concurrent requests; retry later"

    limit: int


@dataclass(eq=False)
class EncoderBusy(DeploymentsError):
    """Too many prompts wait for the encoder (`retrieval.max_waiting`)."""

    kind = Kind.BUSY
    code = "overloaded"
    remedy = "Retry after `Retry-After` seconds, or name adapters, which needs no encoder."
    text = "{self.num_waiting} prompts already wait for the encoder; retry later, or name adapters in the request"

    num_waiting: int
    has_read: bool  # whether the encoder has read some of the call's texts, before others needed their places


class NotReady(DeploymentsError):
    """The server is starting."""

    kind = Kind.UNAVAILABLE
    code = "not_ready"
    remedy = "Wait until `GET /ready` answers 200."


@dataclass(eq=False)
class ShapesUnknown(NotReady):
    """The Store cannot check an adapter before a worker of its base model has told the shapes of its modules."""

    text = "no worker of the base model {self.base_model!r} has answered yet; publish again later"

    base_model: str


@dataclass(eq=False)
class WorkerStarting(DeploymentsError):
    """All workers were scaled to zero, and none started within `scale_from_zero_timeout_s`."""

    kind = Kind.UNAVAILABLE
    code = "not_ready"
    remedy = "Retry after `Retry-After` seconds. A worker is starting."
    text = "a worker is still starting after {self.waited_s:.0f} s; retry later"

    waited_s: float


@dataclass(eq=False)
class PoisonRequest(DeploymentsError):
    """Three replicas died while they worked on this request."""

    kind = Kind.BROKEN
    code = "request_failed"
    remedy = "Do not repeat it. Report it with its `x-request-id`."
    text = "{self.num_deaths} replicas died in turn while they worked on this request; do not send it again"

    num_deaths: int


class DeploymentBusy(DeploymentsError):
    """Too many requests wait for one of the deployments."""

    kind = Kind.BUSY
    code = "overloaded"
    remedy = RETRY_LATER
    text = "too many requests wait; retry later"


class DeploymentUnavailable(DeploymentsError):
    """No replica of one of the deployments runs."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = RETRY_LATER
    text = "a component of the server is unavailable; retry later"


class NoAnswerInTime(DeploymentsError):
    """A component of the server did not answer in time."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = RETRY_LATER
    text = "a component of the server did not answer in time; retry later"


class ReplicaDied(DeploymentsError):
    """A replica died while it worked on the request."""

    kind = Kind.UNAVAILABLE
    code = "replica_died"
    remedy = "Repeat the request."
    text = "the replica that worked on this request has died; send the request again"


class Unforeseen(DeploymentsError):
    """The server met an error that it does not know. The log has the details under the request's id."""

    kind = Kind.UNFORESEEN
    code = "internal_error"
    remedy = "Report it with the `x-request-id` of the answer."
    text = "the server failed to answer this request"


class ReplicaStuck(DeploymentsError):
    """A health check found the engine's thread stuck or ended. Serve replaces the replica."""


@dataclass(eq=False)
class RayUnauthenticated(DeploymentsError):
    """Ray runs without token authentication. `mode`: the value of RAY_AUTH_MODE, if set."""

    mode: str | None

    def __str__(self) -> str:
        given = "is not set" if self.mode is None else f"is {self.mode!r}"
        return (
            f"Ray runs without token authentication (RAY_AUTH_MODE {given}): anyone who reaches one of its ports could "
            "run code as this server. Set RAY_AUTH_MODE=token for `ray start` on every node and for this program, and "
            "create the token once with `ray get-auth-token --generate`. On an isolated network, set "
            "allow_unauthenticated_ray: true in the settings to start without it"
        )


@dataclass(eq=False)
class ProxyUnsafe(DeploymentsError):
    """Ray's HAProxy hides client addresses, and no keys are set."""

    text = (
        "{self.variable}=1 makes every client appear local, and without keys local clients may change the pool: "
        "set keys_file in the settings, or unset {self.variable}"
    )

    variable: str


class BatchRefused(DeploymentsError):
    """An offline run cannot start or resume, or its parts are not where they belong."""
