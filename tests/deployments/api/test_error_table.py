from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments import errors as api_errors
from deployments.api.error_table import STATUSES, describe, reported_errors
from deployments.http.error_responses import error_response
from gpu_worker import errors as worker_errors
from lora_store import errors as store_errors
from lora_store.error_kinds import Kind, ReportedError
from retriever_svc import errors as retriever_errors
from tests.fakes import as_ray_raises

INVALID, OVERLOADED = "invalid_request_error", "overloaded_error"
EXPECTED = [
    (api_errors.RequestInvalid("lora: no", "lora"), 400, INVALID, "invalid_request"),
    (api_errors.Unsupported("tools", "it"), 400, INVALID, "unsupported"),
    (api_errors.ResponseNotStored(), 400, INVALID, "previous_response_not_found"),
    (api_errors.KeyRefused("no key"), 401, INVALID, "invalid_api_key"),
    (api_errors.RoleMissing("key-1", "admin"), 403, "permission_error", "permission_denied"),
    (api_errors.KeysUnavailable("gone"), 503, "overloaded_error", "unavailable"),
    (api_errors.SelfApproval("x", "acme"), 403, "permission_error", "permission_denied"),
    (api_errors.RateLimited("9 requests per minute", 2.0), 429, "rate_limit_error", "rate_limit_exceeded"),
    (api_errors.ModelNotFound("x"), 404, "not_found_error", "model_not_found"),
    (store_errors.AdapterNotFound("x"), 404, "not_found_error", "model_not_found"),
    (api_errors.VersionNotKept("x", "a" * 8, ["b" * 64]), 404, "not_found_error", "version_not_found"),
    (api_errors.NoTrial("x", ["b" * 64]), 404, "not_found_error", "version_not_found"),
    (api_errors.RequestNotKept("x"), 404, "not_found_error", "request_not_kept"),
    (api_errors.VersionChanged("x", "a" * 64, "b" * 64), 409, INVALID, "version_changed"),
    (api_errors.AdapterExists("x"), 400, INVALID, "invalid_request"),
    (api_errors.HostRefused("evil.example"), 421, INVALID, "permission_denied"),
    (api_errors.OriginRefused("https://evil.example"), 403, "permission_error", "permission_denied"),
    (api_errors.PublishingDisabled("off"), 403, "permission_error", "permission_denied"),
    (api_errors.SourceRefused("s3://b/x", "is not allowed"), 403, "permission_error", "permission_denied"),
    (api_errors.SourceMissing("s3://b/x"), 404, "not_found_error", "adapter_refused"),
    (api_errors.SourceUnavailable("s3://b/x", "refused"), 503, OVERLOADED, "unavailable"),
    (api_errors.BodyNotAllowed("GET takes no body"), 400, INVALID, "invalid_request"),
    (api_errors.BodyTooLarge("large"), 413, INVALID, "body_too_large"),
    (api_errors.BodyTooSlow("slow"), 408, INVALID, "request_too_slow"),
    (api_errors.UploadMemoryFull(9), 503, OVERLOADED, "overloaded"),
    (api_errors.UploadDiskFull(), 503, OVERLOADED, "unavailable"),
    (api_errors.ServerOverloaded(9), 429, OVERLOADED, "overloaded"),
    (api_errors.BodyMemoryFull(9), 503, OVERLOADED, "overloaded"),
    (api_errors.EncoderBusy(9, has_read=False), 503, OVERLOADED, "overloaded"),
    (api_errors.NotReady("wait"), 503, OVERLOADED, "not_ready"),
    (api_errors.ShapesUnknown("code"), 503, OVERLOADED, "not_ready"),
    (api_errors.WorkerStarting(30), 503, OVERLOADED, "not_ready"),
    (api_errors.DeploymentBusy(), 503, OVERLOADED, "overloaded"),
    (api_errors.DeploymentUnavailable(), 503, OVERLOADED, "unavailable"),
    (api_errors.NoAnswerInTime(), 503, OVERLOADED, "unavailable"),
    (api_errors.ReplicaDied(), 503, OVERLOADED, "replica_died"),
    (api_errors.PoisonRequest(3), 500, "server_error", "request_failed"),
    (store_errors.PublicNameTaken("x", ["it is taken"]), 409, INVALID, "name_taken"),
    (store_errors.NameTaken("x", "an adapter"), 409, INVALID, "name_taken"),
    (store_errors.QuotaExceeded("adapters", 4, 3), 403, "permission_error", "quota_exceeded"),
    (store_errors.AdapterRefused("x", ["a", "b"]), 400, INVALID, "adapter_refused"),
    (store_errors.PlanInvalid("plan"), 400, INVALID, "invalid_request"),
    (store_errors.VersionConflict(3), 503, OVERLOADED, "overloaded"),
    (store_errors.StoreUnavailable("connection refused"), 503, OVERLOADED, "store_unavailable"),
    (store_errors.StoreFull("No space left on device"), 503, OVERLOADED, "store_unavailable"),
    (store_errors.StoreDamaged("/pool/part-1.zstd.parquet", "is empty"), 500, "server_error", "store_damaged"),
    (store_errors.StoreIsNewer("change the adapter store", "0.3.0"), 503, OVERLOADED, "unavailable"),
    (store_errors.EncoderIncomplete([]), 503, OVERLOADED, "unavailable"),
    (store_errors.BlobCorrupted("d", "e"), 500, "server_error", "store_damaged"),
    (retriever_errors.EncoderUnusable("m", "no weights"), 400, INVALID, "invalid_request"),
    (retriever_errors.ProjectionUnusable("missing"), 400, INVALID, "invalid_request"),
    (retriever_errors.RouteInvalid("k"), 400, INVALID, "invalid_request"),
    (retriever_errors.NoAdapterMatched(0.1, 0.2), 422, INVALID, "no_adapter_matched"),
    (retriever_errors.AdapterIncompatible("x", "a", "b"), 400, INVALID, "adapter_incompatible"),
    (retriever_errors.PlanGone("x", "d"), 409, INVALID, "plan_gone"),
    (retriever_errors.StaleIndex(2, 1), 503, OVERLOADED, "stale_index"),
    (worker_errors.SamplingInvalid("top_p"), 400, INVALID, "invalid_request"),
    (worker_errors.PromptInvalid("prompt"), 400, INVALID, "invalid_prompt"),
    (worker_errors.PromptTooLong("long"), 400, INVALID, "context_length_exceeded"),
    (worker_errors.PlanTooLarge("rows"), 400, INVALID, "invalid_request"),
    (worker_errors.AdapterUnfit("fit"), 400, INVALID, "adapter_incompatible"),
    (worker_errors.GrammarInvalid("no", "/properties/a", "response_format"), 400, INVALID, "invalid_request"),
    (worker_errors.GrammarFailed("complex"), 422, INVALID, "request_failed"),
    (worker_errors.LogitsNotFinite("inf"), 422, INVALID, "request_failed"),
    (worker_errors.RequestFailed("r-1"), 500, "server_error", "request_failed"),
    (worker_errors.AdapterLoadFailed("load"), 503, OVERLOADED, "unavailable"),
    (worker_errors.AdapterLost("lost"), 503, OVERLOADED, "unavailable"),
    (worker_errors.DeadlineExceeded(3), 504, "timeout_error", "deadline_exceeded"),
    (worker_errors.WaitedTooLong(60), 503, OVERLOADED, "overloaded"),
    (worker_errors.EngineFull("full"), 503, OVERLOADED, "overloaded"),
    (worker_errors.EngineStopped("stopped"), 503, OVERLOADED, "unavailable"),
]
STAY_INSIDE = [
    api_errors.ReplicaStuck("stuck"),
    api_errors.RayUnauthenticated(None),
    api_errors.ProxyUnsafe("RAY_X"),
    api_errors.BatchRefused("another run"),
]
RAYS_OWN = [
    (BackPressureError(4, 3), 503, OVERLOADED, "overloaded"),
    (DeploymentUnavailableError(DeploymentID("Worker", "inner")), 503, OVERLOADED, "unavailable"),
    (RayActorError(), 503, OVERLOADED, "replica_died"),
    (ActorDiedError(), 503, OVERLOADED, "replica_died"),
    (ObjectLostError("0" * 56, None, ""), 503, OVERLOADED, "replica_died"),
    (TimeoutError(), 503, OVERLOADED, "unavailable"),
]
NEVER_REACH_A_CLIENT = {
    "ReplicaStuck": "answers Serve's health check",
    "BatchRefused": "ends a command, and no request",
    "ProxyUnsafe": "stops the application's build",
    "RayUnauthenticated": "stops the application's build, or a replica at its start",
    "FileRefused": "becomes a reason of AdapterRefused",
    "BaseModelUnsupported": "stops a Worker at its start",
    "WarmUpFailed": "stops a Worker at its start",
    "WorkerConfigInvalid": "stops the application's build",
    "ConditionalWritesMissing": "stops the Store at its start",
    "GenerationGone": "ends an offline run",
    "TooFewSamples": "ends `pool train`, and no request",
    "TrainingUnavailable": "ends `pool train`, and no request",
    "EncoderExists": "ends `pool train`, and no request",
}


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        if not issubclass(child, RayTaskError):  # Ray raises errors that combine a cause with a Ray error
            yield child
            yield from subclasses(child)


@pytest.mark.parametrize(("error", "status", "type_", "code"), EXPECTED, ids=lambda value: type(value).__name__)
def test_an_error_maps_equally_from_this_process_and_from_a_replica(
    error: Exception, status: int, type_: str, code: str
) -> None:
    lone = RayTaskError("method", "Traceback", error, "replica", 1, "127.0.0.1")
    for raised in (error, as_ray_raises(error), lone):
        found, body = describe(raised)
        assert found == status
        param = getattr(error, "param", None)
        message = getattr(error, "client_message", str(error))
        assert body == {"error": {"message": message, "type": type_, "param": param, "code": code}}
        headers = error_response(raised).headers
        expected = str(math.ceil(getattr(error, "retry_after_s", 1))) if status in (429, 503) else None
        assert headers.get("retry-after") == expected
        is_final = status in (409, 500, 504)
        assert headers.get("x-should-retry") == ("false" if is_final else None)
        assert headers.get("www-authenticate") == {401: "Bearer"}.get(status)


@pytest.mark.parametrize(
    "error",
    [*[row[0] for row in EXPECTED], *STAY_INSIDE, api_errors.Unforeseen()],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling_between_replicas(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.__dict__) == (str(error), error.__dict__)
    assert str(error).strip()


@pytest.mark.parametrize(("error", "status", "type_", "code"), RAYS_OWN, ids=lambda value: type(value).__name__)
def test_rays_errors_map_without_internal_details(error: Exception, status: int, type_: str, code: str) -> None:
    found, body = describe(error)
    assert (found, body["error"]["type"], body["error"]["code"]) == (status, type_, code)
    message = body["error"]["message"].lower()
    assert message
    assert not [word for word in ("actor", "deployment", "inner", "num_queued", "node") if word in message]


def test_every_error_that_can_reach_a_client_has_a_case_and_all_of_its_texts() -> None:
    found = set(reported_errors())
    assert found == {type(error) for error, *_ in EXPECTED} | {api_errors.Unforeseen}
    for error in found:
        assert error.code.islower() and error.remedy.endswith(".") and error.__doc__, error.__name__


def test_errors_share_a_code_where_a_client_would_do_the_same() -> None:
    """A new code is a new case in every client: add one only if a client can do something that it cannot do now."""
    assert len({error.code for error in reported_errors()}) <= 30


def test_every_other_error_is_known_to_stay_inside() -> None:
    found = {kind.__name__ for kind in subclasses(ReportedError) if kind.__module__.endswith(".errors")}
    bases = {"DeploymentsError", "GpuWorkerError", "LoraStoreError", "RetrieverError"}
    assert len(found) > len(EXPECTED)
    assert found - {kind.__name__ for kind in reported_errors()} - bases == NEVER_REACH_A_CLIENT.keys()
    of_this_package = NEVER_REACH_A_CLIENT.keys() & vars(api_errors).keys()
    assert {type(error).__name__ for error in STAY_INSIDE} == of_this_package


def test_no_error_is_defined_where_the_errors_page_does_not_look() -> None:
    """A class outside the four modules of errors would answer requests without a row in the documentation."""
    ours = ("deployments.", "gpu_worker.", "lora_store.", "retriever_svc.")
    elsewhere = {
        f"{kind.__module__}.{kind.__name__}"
        for kind in subclasses(ReportedError)
        if kind.__module__.startswith(ours) and not kind.__module__.endswith((".errors", ".error_kinds"))
    }
    assert not elsewhere


def test_every_kind_has_a_status_and_an_error() -> None:
    assert STATUSES.keys() == set(Kind) == {error.kind for error in reported_errors()}


@pytest.mark.parametrize("error", [RuntimeError("secret"), as_ray_raises(KeyError("secret"))])
def test_an_unexpected_error_is_logged_and_reveals_no_details(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    status, body = describe(error)
    assert status == 500
    assert body["error"] == {
        "message": "the server failed to answer this request",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_a_subclass_has_the_code_of_its_base() -> None:
    class Narrower(store_errors.AdapterRefused):
        """A refusal that a later version might add."""

    assert describe(Narrower("x", ["a"]))[1]["error"]["code"] == "adapter_refused"
