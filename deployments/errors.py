"""Errors of the API itself.

DeploymentsError
├── RequestInvalid     the request breaks a rule; `param` names the field
├── Unsupported        the request asks for a part of the OpenAI API that this server does not have
├── KeyRefused         no key came, or one that is none of this server's
├── KeysUnavailable    the keys file is missing for longer than the server may go on without it
├── RoleMissing        the key may not do this
├── OwnApproval        an admin approves an adapter of its own tenant
├── RateLimited        the key has used what it may for now
├── ModelNotFound      `model` names nothing this caller may use
├── VersionNotKept     the adapter has no kept version of that digest
├── VersionChanged     another version is live than the one the request names
├── AdapterExists      the name is taken and the request does not say that it may be replaced
├── HostRefused        the Host header is not a name of this server
├── OriginRefused      a page of another origin asks
├── PublishingOff      this door does not publish
├── SourceRefused      the URI is not one that adapters may be published from
├── SourceMissing      there is nothing to publish at that place
├── SourceUnavailable  the source does not answer
├── BodyNotAllowed     the method has no body, and one came
├── BodyTooLarge       the body is larger than the server reads
├── BodyTooSlow        the body did not come in time
├── BodiesBusy         the bodies in memory leave no room for this one
├── UploadsBusy        the uploads in progress leave no room for this one
├── ServerOverloaded   this replica works on as many requests as it may
├── EncoderBusy        more prompts wait for the encoder than it has room for
├── NotReady           the server is still starting
├── NoWorkerYet        all workers were scaled away, and none has started again in time
├── Poisoned           a third replica died while it worked on this request
├── ReplicaWedged      a health check found the engine hanging; Serve replaces the replica
├── RayUnauthenticated Ray would run code for any client of its ports
├── ProxyUnsafe        Ray's HAProxy hides the clients' addresses, and no keys are set
└── BatchRefused       an offline run cannot begin, or cannot go on, as it was asked for
"""

from __future__ import annotations

from collections.abc import Sequence


class DeploymentsError(Exception):
    """Base class of what the API itself refuses."""


class RequestInvalid(DeploymentsError):
    """Mend the request."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class Unsupported(DeploymentsError):
    """Leave this field out. `what` tells which use of it is not supported."""

    def __init__(self, param: str, what: str) -> None:
        super().__init__(param, what)
        self.param = param
        self.what = what

    def __str__(self) -> str:
        return f"{self.param}: this server does not support {self.what}"


class KeyRefused(DeploymentsError):
    """Send a valid key."""


class KeysUnavailable(DeploymentsError):
    """Ask again once the operator has put the keys file back."""


class RoleMissing(DeploymentsError):
    """Use a key with this role."""

    def __init__(self, key_id: str, role: str) -> None:
        super().__init__(key_id, role)
        self.key_id = key_id
        self.role = role

    def __str__(self) -> str:
        return f"the key {self.key_id!r} has no role {self.role!r}"


class OwnApproval(DeploymentsError):
    """Have another tenant's admin approve it."""

    def __init__(self, name: str, tenant: str) -> None:
        super().__init__(name, tenant)
        self.name = name
        self.tenant = tenant

    def __str__(self) -> str:
        return (
            f"the adapter {self.name!r} belongs to the key's own tenant {self.tenant!r}: "
            "have an admin of another tenant approve it, or set admins_approve_own on the server"
        )


class RateLimited(DeploymentsError):
    """Try again after `retry_after_s`."""

    def __init__(self, limit: str, retry_after_s: float) -> None:
        super().__init__(limit, retry_after_s)
        self.limit = limit
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the key may use {self.limit}; try again in {self.retry_after_s:.1f} s"


class ModelNotFound(DeploymentsError):
    """`model` is neither `auto`, the base model, nor an adapter this caller may use. `hint`: a name it may mean."""

    param = "model"

    def __init__(self, model: str, hint: str = "") -> None:
        super().__init__(model, hint)
        self.model = model
        self.hint = hint

    def __str__(self) -> str:
        return f"the model {self.model!r} does not exist" + (f"; did you mean {self.hint!r}?" if self.hint else "")


class VersionNotKept(DeploymentsError):
    """Roll back to one of the digests in `kept`."""

    def __init__(self, name: str, wanted: str | None, kept: Sequence[str]) -> None:
        super().__init__(name, wanted, tuple(kept))
        self.name = name
        self.wanted = wanted
        self.kept = tuple(kept)

    def __str__(self) -> str:
        wanted = "older version" if self.wanted is None else f"version {self.wanted!r}"
        return f"adapter {self.name!r} has no {wanted}; kept are {', '.join(digest[:12] for digest in self.kept)}"


class VersionChanged(DeploymentsError):
    """Look at the live version, then name its digest."""

    param = "digest"

    def __init__(self, name: str, wanted: str, live: str) -> None:
        super().__init__(name, wanted, live)
        self.name = name
        self.wanted = wanted
        self.live = live

    def __str__(self) -> str:
        return (
            f"digest: {self.wanted!r} is not the live version of adapter {self.name!r}; "
            f"look at {self.live!r}, then approve that digest"
        )


class AdapterExists(DeploymentsError):
    """Unload it first, or say `load_inplace`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"the LoRA adapter {self.name!r} has already been loaded; set load_inplace to replace it"


class HostRefused(DeploymentsError):
    """Use an address or a known name of the server."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host

    def __str__(self) -> str:
        given = f"the Host {self.host!r}" if self.host else "a request without one Host"
        return f"this server does not answer to {given}: use localhost, an IP address, or a name of allowed_hosts"


class OriginRefused(DeploymentsError):
    """Ask from a page of the server's own."""

    def __init__(self, origin: str) -> None:
        super().__init__(origin)
        self.origin = origin

    def __str__(self) -> str:
        return f"pages of {self.origin!r} may not ask this server: its own and those of this machine may"


class PublishingOff(DeploymentsError):
    """Publish from the server's own machine, or switch publishing on."""


class SourceRefused(DeploymentsError):
    """Publish from a place below one of the tenant's `source_prefixes`."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"the source {self.source[:200]!r} {self.reason}"


class SourceMissing(DeploymentsError):
    """Say where the adapter's folder is."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place

    def __str__(self) -> str:
        return f"there is no adapter at {self.place[:200]!r}"


class SourceUnavailable(DeploymentsError):
    """The source cannot be read now. Try again; the server's log says why.

    The text is for the log: it may quote endpoints and paths. `client_message` quotes what the client sent.
    """

    def __init__(self, source: str, cause: str) -> None:
        super().__init__(source, cause)
        self.source = source
        self.cause = cause

    def __str__(self) -> str:
        return f"the source {self.source[:200]!r} cannot be read: {self.cause[:500]}"

    @property
    def client_message(self) -> str:
        return f"the source {self.source[:200]!r} cannot be read now; try again later, or ask who runs the server"


class BodyNotAllowed(DeploymentsError):
    """Send the request without a body."""


class BodyTooLarge(DeploymentsError):
    """Send less."""


class BodyTooSlow(DeploymentsError):
    """Send it in less time."""


class BodiesBusy(DeploymentsError):
    """Ask again once others are answered."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return f"this body and those of other requests have more than {self.max_bytes} bytes; try again later"


class UploadsBusy(DeploymentsError):
    """Upload again once others have ended."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return f"this upload and those in progress have more than {self.max_bytes} bytes; try again later"


class ServerOverloaded(DeploymentsError):
    """Ask again later."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"the server works on {self.limit} requests already; try again later"


class EncoderBusy(DeploymentsError):
    """Ask again later, or for fewer prompts at once."""

    def __init__(self, num_waiting: int) -> None:
        super().__init__(num_waiting)
        self.num_waiting = num_waiting

    def __str__(self) -> str:
        return f"{self.num_waiting} prompts wait for the encoder already; try again later, or name adapters yourself"


class NotReady(DeploymentsError):
    """Wait until `/ready` answers 200."""


class NoWorkerYet(DeploymentsError):
    """Ask again: a worker is starting."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(waited_s)
        self.waited_s = waited_s

    def __str__(self) -> str:
        return f"no worker has started within {self.waited_s:.0f} s; one is on its way, try again later"


class PoisonRequest(DeploymentsError):
    """Do not ask this again: it seems to be the request that replicas die of."""

    def __init__(self, num_deaths: int) -> None:
        super().__init__(num_deaths)
        self.num_deaths = num_deaths

    def __str__(self) -> str:
        return f"{self.num_deaths} replicas died, one after the other, while they worked on this request"


class ReplicaWedged(DeploymentsError):
    """The engine's thread hangs or has ended; Serve replaces the replica."""


class RayUnauthenticated(DeploymentsError):
    """Switch Ray's token mode on, or allow it to be off. `mode`: what RAY_AUTH_MODE says, None where it is not set."""

    def __init__(self, mode: str | None) -> None:
        super().__init__(mode)
        self.mode = mode

    def __str__(self) -> str:
        given = "is not set" if self.mode is None else f"is {self.mode!r}"
        return (
            f"Ray runs without token authentication here (RAY_AUTH_MODE {given}): whoever reaches one of its ports "
            "could run code as this server. Set RAY_AUTH_MODE=token for `ray start` on every node and for this program "
            "and create the token once with `ray get-auth-token --generate`. On a network that nobody else can reach, "
            "allow_unauthenticated_ray: true in the settings starts the application without it"
        )


class ProxyUnsafe(DeploymentsError):
    """Set `keys_file`, or start Ray without its HAProxy."""

    def __init__(self, variable: str) -> None:
        super().__init__(variable)
        self.variable = variable

    def __str__(self) -> str:
        return (
            f"{self.variable}=1 makes every client look as if it were on this machine, and without keys such clients "
            f"may change the pool: set keys_file in the settings, or unset {self.variable}"
        )


class BatchRefused(DeploymentsError):
    """Mend the input or the settings, or choose another output folder: nothing was done."""
