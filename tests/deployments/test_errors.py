from __future__ import annotations

import pickle

import pytest

from deployments import errors
from deployments.errors import (
    DeploymentsError,
    ModelNotFound,
    PoisonRequest,
    RateLimited,
    RequestInvalid,
    SourceUnavailable,
    VersionNotKept,
)

KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, DeploymentsError) and kind is not DeploymentsError
}
ERRORS: list[DeploymentsError] = [
    errors.RequestInvalid("lora: no", "lora"),
    errors.Unsupported("tools", "it"),
    errors.KeyRefused("no key"),
    errors.KeysUnavailable("gone"),
    errors.RoleMissing("key-1", "admin"),
    errors.SelfApproval("poet", "acme"),
    errors.RateLimited("9 requests per minute", 2.5),
    errors.ModelNotFound("peot", "poet"),
    errors.VersionNotKept("poet", "a" * 8, ["b" * 64, "c" * 64]),
    errors.NoTrial("poet", ["b" * 64, "c" * 64]),
    errors.VersionChanged("poet", "a" * 64, "b" * 64),
    errors.RequestNotKept("abc"),
    errors.AdapterExists("poet"),
    errors.HostRefused("evil.example"),
    errors.OriginRefused("https://evil.example"),
    errors.PublishingDisabled("off"),
    errors.SourceRefused("s3://b/x", "is not allowed"),
    errors.SourceMissing("s3://b/x"),
    errors.SourceUnavailable("s3://b/x", "127.0.0.1 refused"),
    errors.BodyNotAllowed("GET takes no body"),
    errors.BodyTooLarge("large"),
    errors.BodyTooSlow("slow"),
    errors.BodyMemoryFull(9),
    errors.UploadMemoryFull(9),
    errors.UploadDiskFull(),
    errors.ServerOverloaded(9),
    errors.EncoderBusy(9),
    errors.NotReady("wait"),
    errors.ShapesUnknown("code"),
    errors.WorkerStarting(30),
    errors.ResponseNotStored(),
    errors.DeploymentBusy(),
    errors.DeploymentUnavailable(),
    errors.NoAnswerInTime(),
    errors.ReplicaDied(),
    errors.Unforeseen(),
    errors.PoisonRequest(3),
    errors.ReplicaStuck("stuck"),
    errors.RayUnauthenticated(None),
    errors.ProxyUnsafe("RAY_X"),
    errors.BatchRefused("another run"),
]


def test_every_error_has_a_case() -> None:
    assert KINDS.keys() == {type(error).__name__ for error in ERRORS}, "add an instance of the new class to ERRORS"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling_between_replicas(error: DeploymentsError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.__dict__) == (str(error), error.__dict__)
    assert str(error).strip()


def test_messages_name_the_given_value_and_the_remedy() -> None:
    assert str(RequestInvalid("lora.k must be 1 to 16", "lora.k")) == "lora.k must be 1 to 16"
    assert "did you mean 'poet'" in str(ModelNotFound("peot", "poet")) and "peot" in str(ModelNotFound("peot"))
    assert "9 requests per minute" in str(RateLimited("9 requests per minute", 2.5))
    assert "3" in str(PoisonRequest(3))
    kept = str(VersionNotKept("poet", "a" * 8, ["b" * 64, "c" * 64]))
    assert "poet" in kept and "a" * 8 in kept and "b" * 12 in kept and "b" * 13 not in kept


def test_the_cause_of_a_failed_source_is_hidden_from_clients() -> None:
    error = SourceUnavailable("s3://b/x", "127.0.0.1 refused")
    assert "127.0.0.1" in str(error) and "127.0.0.1" not in error.client_message and "s3://b/x" in error.client_message
