"""The base class of every error of this project.

A class holds everything that is known about its error: a new error is a new class, and nothing else. The HTTP layer
has a status for each kind. The errors page of the documentation is made from the classes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import ClassVar

RETRY_LATER = "Retry after `Retry-After` seconds."  # the remedy of many errors


class Kind(Enum):
    """Who can do something about an error, and what. The value is the meaning as the API documents it."""

    INVALID = "The request breaks a rule; `param` names the field."
    UNAUTHENTICATED = "The key is missing, unknown or expired."
    FORBIDDEN = "This client may not do this."
    MISSING = "There is no such model, adapter, version or route for this caller."
    TOO_SLOW = "The client sent the request too slowly."
    CONFLICT = "The pool has changed since the client read it, or another tenant has the name."
    TOO_LARGE = "The body is larger than the limit."
    WRONG_HOST = "The `Host` header is not a name of this server."
    UNANSWERABLE = "The request is valid, but no answer can be generated for it."
    LIMITED = "A limit of the caller is used up."
    FULL = "The server has no place for another request of this tenant."
    BROKEN = "The server failed, and a retry fails again."
    UNFORESEEN = "The server met an unforeseen error."
    BUSY = "A component is overloaded."
    UNAVAILABLE = "A component is still starting, or unavailable."
    LATE = "The request exceeded its deadline (`timeout_s` or the server's limit)."


class ReportedError(Exception):
    """Base class of the errors of all packages. The docstring of a class states the cause.

    `kind`: None for an error that never reaches a client of the API.
    `code`: the code in the API's error object. Errors after which a client would do the same share one.
    `remedy`: the action that helps.
    `text`: the message, with fields of the error, as in "no model {self.model!r}".
    """

    kind: ClassVar[Kind | None] = None
    code: ClassVar[str] = ""
    remedy: ClassVar[str] = ""
    text: ClassVar[str] = ""
    param: str | None = None  # the field of the request
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        """Take a dataclass's fields as arguments: an error is pickled with these when a replica sends it."""
        self.args = tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.text.format(self=self) if self.text else super().__str__()

    @property
    def client_message(self) -> str:
        """Return the text for clients. It differs from the text for the log where that may quote buckets or paths."""
        return str(self)


@dataclass(eq=False)
class FieldError(ReportedError):
    """An error of one field of a request. `param` names it, if it is known."""

    message: str
    param: str | None = None

    def __str__(self) -> str:
        return self.message
