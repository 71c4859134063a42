"""Errors pass between processes unchanged, whichever part of the server raises them."""

from __future__ import annotations

import pickle
from types import ModuleType

import pytest

from gpu_worker import errors as of_the_worker
from gpu_worker.errors import DeadlineExceeded, GpuWorkerError, RequestFailed, SamplingInvalid, WaitedTooLong
from lora_store import AdapterRef
from lora_store import errors as of_the_store
from lora_store.errors import (
    AdapterNotFound,
    AdapterRefused,
    BlobCorrupted,
    ConditionalWritesMissing,
    EncoderIncomplete,
    FileRefused,
    GenerationGone,
    LoraStoreError,
    NameTaken,
    PlanInvalid,
    PublicNameTaken,
    QuotaExceeded,
    StoreDamaged,
    StoreFull,
    StoreIsNewer,
    StoreUnavailable,
    VersionConflict,
)
from retriever_svc import errors as of_the_retriever
from retriever_svc.errors import (
    AdapterIncompatible,
    EncoderExists,
    EncoderUnusable,
    NoAdapterMatched,
    PlanGone,
    ProjectionUnusable,
    RetrieverError,
    RouteInvalid,
    StaleIndex,
    TooFewSamples,
    TrainingUnavailable,
)


def kinds_in(module: ModuleType, base: type[Exception]) -> set[type[Exception]]:
    """Return the error classes of a module, without their base."""
    return {kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)} - {base}


ERRORS: list[Exception] = [
    AdapterRefused("poet", ["rank 0", "no weights"]),
    PublicNameTaken("poet", ["the name belongs to another tenant"]),
    NameTaken("support", "an adapter"),
    QuotaExceeded("adapters", 6, 5),
    AdapterNotFound("poet"),
    AdapterNotFound("peot", "poet"),
    AdapterNotFound("poet", owner="acme"),
    FileRefused("adapter_config.json", ["r must be at least 1", "no base model"]),
    BlobCorrupted("a" * 64, "b" * 64),
    PlanInvalid("no adapters"),
    VersionConflict(3),
    GenerationGone(2, 9),
    ConditionalWritesMissing(200, 200),
    StoreUnavailable("s3://bucket does not answer"),
    StoreFull("No space left on device"),
    StoreDamaged("/pool/catalogue/part-1.zstd.parquet", "is empty"),
    StoreDamaged("/pool/catalogue/_delta_log", "is missing", "mount its volume"),
    StoreIsNewer("change the adapter store", "0.3.0"),
    EncoderIncomplete([AdapterRef("local", "poet", "d" * 64)]),
    EncoderUnusable("some/model", "no weights"),
    ProjectionUnusable("the projection is damaged"),
    AdapterIncompatible("poet", "org/old", "org/new"),
    RouteInvalid("top_k"),
    PlanGone("a", "d" * 64),
    TooFewSamples("none"),
    TrainingUnavailable(["accelerate", "datasets"]),
    EncoderExists("some/folder"),
    NoAdapterMatched(0.25, 0.5),
    NoAdapterMatched(None, -1.0),
    StaleIndex(7, 5),
    *(
        kind("what was wanted, what was got")
        for kind in sorted(kinds_in(of_the_worker, GpuWorkerError) - {WaitedTooLong}, key=str)
    ),
    DeadlineExceeded(3),
    WaitedTooLong(2.5),
    RequestFailed("r-1"),
    SamplingInvalid("top_p is 2", "top_p"),
]


@pytest.mark.parametrize(
    ("module", "base"),
    [(of_the_store, LoraStoreError), (of_the_retriever, RetrieverError), (of_the_worker, GpuWorkerError)],
)
def test_every_error_has_a_case(module: ModuleType, base: type[Exception]) -> None:
    missing = kinds_in(module, base) - {type(error) for error in ERRORS}
    assert not missing and len(kinds_in(module, base)) > 9, "add an instance of the new class to ERRORS"


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_survive_pickling_between_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.__dict__) == (str(error), error.__dict__)
