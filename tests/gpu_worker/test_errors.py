from __future__ import annotations

import pickle

import pytest

from gpu_worker import errors
from gpu_worker.errors import DeadlineExceeded, GpuWorkerError, RequestFailed, SamplingInvalid, WaitedTooLong

NAMES = sorted(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, GpuWorkerError)
)


def test_the_errors_are_walked() -> None:
    assert len(NAMES) > 10


@pytest.mark.parametrize("name", NAMES)
def test_errors_survive_pickling(name: str) -> None:
    error = getattr(errors, name)("what was wanted, what was got")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and copy.args == error.args
    assert isinstance(error, GpuWorkerError)


@pytest.mark.parametrize(
    "error", [DeadlineExceeded(3), WaitedTooLong(2.5), RequestFailed("r-1"), SamplingInvalid("top_p is 2", "top_p")]
)
def test_errors_keep_their_message_between_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)
