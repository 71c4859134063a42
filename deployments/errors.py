"""Errors of the API itself.

DeploymentsError
├── RequestInvalid   the request breaks a rule; `param` names the field
├── ModelNotFound    `model` names nothing this caller may use
├── PublishingOff    this door does not publish
├── BodyTooLarge     the body is larger than the server reads
├── NotReady         the server is still starting
└── ReplicaWedged    a health check found the engine hanging; Serve replaces the replica
"""

from __future__ import annotations


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


class ModelNotFound(DeploymentsError):
    """`model` is neither `auto`, the base model, nor an adapter this caller may use."""

    param = "model"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        return f"the model {self.model!r} does not exist"


class PublishingOff(DeploymentsError):
    """Publish from the server's own machine, or switch publishing on."""


class BodyTooLarge(DeploymentsError):
    """Send less."""


class NotReady(DeploymentsError):
    """Wait until `/ready` answers 200."""


class ReplicaWedged(DeploymentsError):
    """The engine's thread hangs or has ended; Serve replaces the replica."""
