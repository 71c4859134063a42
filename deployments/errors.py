"""Errors of the API itself.

DeploymentsError
├── RequestInvalid      the request breaks a rule; `param` names the field
├── Unsupported         the request uses a part of the OpenAI API that this server does not serve
├── ResponseNotStored   the request continues an earlier response, and none is stored
├── KeyRefused          the request has no API key, or an unknown one
├── KeysUnavailable     the keys file has been missing for too long
├── RoleMissing         the key does not have the role that this operation needs
├── SelfApproval        an admin approves an adapter of its own tenant
├── RateLimited         the key has used up a rate limit
├── ModelNotFound       `model` is not a model that this caller may use
├── VersionNotKept      the server keeps no version of the adapter with that digest
│   └── NoTrial         no version is under trial, and the request names none
├── VersionChanged      the live version is not the one that the request names
├── RequestNotKept      the server does not keep the request that an outcome names
├── AdapterExists       the name is taken and the request does not allow replacing it
├── HostRefused         the Host header is not a name of this server
├── OriginRefused       the request comes from a web page of another origin
├── PublishingDisabled  this server does not accept changes from this client
├── SourceRefused       adapters must not be published from this URI
├── SourceMissing       the source has no adapter
├── SourceUnavailable   the source cannot be read at the moment
├── BodyNotAllowed      the method does not take a body
├── BodyTooLarge        the body is larger than the limit
├── BodyTooSlow         the body did not arrive in time
├── BodyMemoryFull      the memory for request bodies is used up
├── UploadMemoryFull    the byte budget for uploads, or the disk, is used up
├── ServerOverloaded    this replica is at its limit of concurrent requests
├── EncoderBusy         too many prompts wait for the encoder
├── NotReady            the server is still starting
├── WorkerStarting      all workers were scaled to zero and none has started in time
├── PoisonRequest       a third replica died while it worked on this request
├── ReplicaStuck        a health check found the engine stuck; Serve replaces the replica
├── RayUnauthenticated  Ray runs without authentication
├── ProxyUnsafe         Ray's HAProxy hides client addresses, and no keys are set
└── BatchRefused        an offline run cannot start or resume
"""

from __future__ import annotations

from collections.abc import Sequence


class DeploymentsError(Exception):
    """Base class of the errors of the API itself."""


class RequestInvalid(DeploymentsError):
    """Correct the request."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class Unsupported(DeploymentsError):
    """Leave this field out. `what`: the unsupported use of it, and after a colon what to do instead."""

    def __init__(self, param: str, what: str) -> None:
        super().__init__(param, what)
        self.param = param
        self.what = what

    def __str__(self) -> str:
        what, _, remedy = self.what.partition(": ")
        return f"{self.param}: this server does not support {what} yet; {remedy or 'leave it out'}"


class ResponseNotStored(DeploymentsError):
    """Send the whole conversation. Clients of the Responses API know the code of this error and do so."""

    param = "previous_response_id"

    def __str__(self) -> str:
        return f"{self.param}: this server stores no responses; send the whole conversation in input"


class KeyRefused(DeploymentsError):
    """Send a valid key."""


class KeysUnavailable(DeploymentsError):
    """Retry once the operator has restored the keys file."""


class RoleMissing(DeploymentsError):
    """Use a key that has this role."""

    def __init__(self, key_id: str, role: str) -> None:
        super().__init__(key_id, role)
        self.key_id = key_id
        self.role = role

    def __str__(self) -> str:
        return f"this operation needs the role {self.role!r}, which the key {self.key_id!r} does not have"


class SelfApproval(DeploymentsError):
    """Have another tenant's admin approve it."""

    def __init__(self, name: str, tenant: str) -> None:
        super().__init__(name, tenant)
        self.name = name
        self.tenant = tenant

    def __str__(self) -> str:
        return (
            f"the adapter {self.name!r} belongs to the key's own tenant {self.tenant!r}: "
            "ask an admin of another tenant to approve it, or set allow_self_approval on the server"
        )


class RateLimited(DeploymentsError):
    """Retry after `retry_after_s`."""

    def __init__(self, limit: str, retry_after_s: float) -> None:
        super().__init__(limit, retry_after_s)
        self.limit = limit
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the key's limit of {self.limit} is exceeded; retry in {self.retry_after_s:.1f} s"


class ModelNotFound(DeploymentsError):
    """Use `auto`, the base model, or an adapter that the caller may use. `hint`: a similar name."""

    param = "model"

    def __init__(self, model: str, hint: str = "") -> None:
        super().__init__(model, hint)
        self.model = model
        self.hint = hint

    def __str__(self) -> str:
        hint = f"; did you mean {self.hint!r}?" if self.hint else "; use 'auto', or a name that GET /v1/models lists"
        return f"no model or adapter {self.model!r}{hint}"


class VersionNotKept(DeploymentsError):
    """Name one of the digests in `kept`. `wanted`: None for the one before the live one."""

    param = "digest"

    def __init__(self, name: str, wanted: str | None, kept: Sequence[str]) -> None:
        super().__init__(name, wanted, tuple(kept))
        self.name = name
        self.wanted = wanted
        self.kept = tuple(kept)

    def __str__(self) -> str:
        wanted = "older version" if self.wanted is None else f"version {self.wanted!r}"
        return f"adapter {self.name!r} has no {wanted}; it has {', '.join(digest[:12] for digest in self.kept)}"


class NoTrial(VersionNotKept):
    """Name one of the digests in `kept`, which are not live, as the version that gets a share."""

    def __init__(self, name: str, kept: Sequence[str]) -> None:
        super().__init__(name, None, kept)
        self.args = (name, self.kept)

    def __str__(self) -> str:
        start = f"digest: no version of {self.name!r} is under trial"
        if not self.kept:
            return f"{start}, and only the live one is kept; publish a new version with a share"
        return f"{start}; name one of the kept versions: {', '.join(digest[:12] for digest in self.kept)}"


class VersionChanged(DeploymentsError):
    """Review the live version, then send its digest."""

    param = "digest"

    def __init__(self, name: str, wanted: str, live: str) -> None:
        super().__init__(name, wanted, live)
        self.name = name
        self.wanted = wanted
        self.live = live

    def __str__(self) -> str:
        return (
            f"digest: {self.wanted!r} is not the live version of adapter {self.name!r}; "
            f"review {self.live!r}, then approve that digest"
        )


class RequestNotKept(DeploymentsError):
    """Send outcomes within a day, for requests to `auto` of a server with the setting `learning`."""

    param = "request_id"

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return (
            f"request_id: no request {self.request_id[:200]!r} of yours is kept; send the x-request-id of a request to"
            " 'auto', at most a day old, to a server with the setting learning: observe or apply"
        )


class AdapterExists(DeploymentsError):
    """Unload it first, or set `load_inplace`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"the LoRA adapter {self.name!r} has already been loaded; set load_inplace to replace it"


class HostRefused(DeploymentsError):
    """Use an IP address or a known name of the server."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host

    def __str__(self) -> str:
        given = f"the Host header {self.host!r} is" if self.host else "a missing or repeated Host header is"
        return f"{given} not allowed: use localhost, an IP address, or a name listed in allowed_hosts"


class OriginRefused(DeploymentsError):
    """Send the request from a page of this server."""

    def __init__(self, origin: str) -> None:
        super().__init__(origin)
        self.origin = origin

    def __str__(self) -> str:
        return f"web pages of {self.origin!r} must not call this server; only its own and those of this machine may"


class PublishingDisabled(DeploymentsError):
    """Publish from the server's machine, or allow remote publishing."""


class SourceRefused(DeploymentsError):
    """Publish from a URI below one of the tenant's `source_prefixes`."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"the source {self.source[:200]!r} {self.reason}"


class SourceMissing(DeploymentsError):
    """Give the folder of the adapter."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place

    def __str__(self) -> str:
        return f"no adapter at {self.place[:200]!r}: give a folder that contains adapter_config.json"


class SourceUnavailable(DeploymentsError):
    """Retry later. The server's log has the cause.

    The text is for the log, because it may quote endpoints and paths. `client_message` quotes the client only.
    """

    def __init__(self, source: str, cause: str) -> None:
        super().__init__(source, cause)
        self.source = source
        self.cause = cause

    def __str__(self) -> str:
        return f"the source {self.source[:200]!r} cannot be read: {self.cause[:500]}"

    @property
    def client_message(self) -> str:
        return f"the source {self.source[:200]!r} cannot be read; retry later, or ask the operator of the server"


class BodyNotAllowed(DeploymentsError):
    """Send the request without a body."""


class BodyTooLarge(DeploymentsError):
    """Send a smaller body."""


class BodyTooSlow(DeploymentsError):
    """Send the body faster."""


class BodyMemoryFull(DeploymentsError):
    """Retry once other requests have ended."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return f"request bodies in memory would exceed {self.max_bytes} bytes; retry later"


class UploadMemoryFull(DeploymentsError):
    """Retry once other uploads have ended. `max_bytes`: the budget; None if the disk is full."""

    def __init__(self, max_bytes: int | None) -> None:
        super().__init__(max_bytes)
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        if self.max_bytes is None:
            return "the server has no disk space for uploads below TMPDIR; retry later"
        return f"uploads in progress would exceed {self.max_bytes} bytes; retry later"


class ServerOverloaded(DeploymentsError):
    """Retry later."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"the server is at its limit of {self.limit} concurrent requests; retry later"


class EncoderBusy(DeploymentsError):
    """Retry later, or send fewer prompts at once."""

    def __init__(self, num_waiting: int) -> None:
        super().__init__(num_waiting)
        self.num_waiting = num_waiting

    def __str__(self) -> str:
        return f"{self.num_waiting} prompts already wait for the encoder; retry later, or name adapters in the request"


class NotReady(DeploymentsError):
    """Wait until `/ready` answers 200."""


class WorkerStarting(DeploymentsError):
    """Retry later: a worker is starting."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(waited_s)
        self.waited_s = waited_s

    def __str__(self) -> str:
        return f"a worker is still starting after {self.waited_s:.0f} s; retry later"


class PoisonRequest(DeploymentsError):
    """Do not retry: this request seems to kill the replicas that work on it."""

    def __init__(self, num_deaths: int) -> None:
        super().__init__(num_deaths)
        self.num_deaths = num_deaths

    def __str__(self) -> str:
        return f"{self.num_deaths} replicas died in turn while they worked on this request; do not send it again"


class ReplicaStuck(DeploymentsError):
    """The engine's thread is stuck or has ended; Serve replaces the replica."""


class RayUnauthenticated(DeploymentsError):
    """Switch on Ray's token mode, or allow Ray without it. `mode`: the value of RAY_AUTH_MODE, if set."""

    def __init__(self, mode: str | None) -> None:
        super().__init__(mode)
        self.mode = mode

    def __str__(self) -> str:
        given = "is not set" if self.mode is None else f"is {self.mode!r}"
        return (
            f"Ray runs without token authentication (RAY_AUTH_MODE {given}): anyone who reaches one of its ports could "
            "run code as this server. Set RAY_AUTH_MODE=token for `ray start` on every node and for this program, and "
            "create the token once with `ray get-auth-token --generate`. On an isolated network, set "
            "allow_unauthenticated_ray: true in the settings to start without it"
        )


class ProxyUnsafe(DeploymentsError):
    """Set `keys_file`, or start Ray without its HAProxy."""

    def __init__(self, variable: str) -> None:
        super().__init__(variable)
        self.variable = variable

    def __str__(self) -> str:
        return (
            f"{self.variable}=1 makes every client appear local, and without keys local clients may change the pool: "
            f"set keys_file in the settings, or unset {self.variable}"
        )


class BatchRefused(DeploymentsError):
    """Correct the input or the settings, or choose another output folder. Nothing was written."""
