"""Errors of the worker.

GpuWorkerError
├── BaseModelUnsupported   the base model cannot be served by this engine; raised at start
├── WorkerConfigInvalid    a setting that no engine could start with; raised at start
├── PromptInvalid          this prompt cannot be rendered
├── PromptTooLong          prompt plus new tokens do not fit `max_model_len`
├── SamplingInvalid        a sampling parameter is out of its range
├── PlanTooLarge           the plan's adapters need more rank rows than the whole bank has
├── AdapterUnfit           an adapter's tensors do not fit the base model
├── AdapterLoadFailed      the weights could not be fetched; only the requests that need them fail
├── LogitsNotFinite        this plan drives the logits out of range; only its own request fails
├── RequestFailed          this request raises in every step it takes part in; do not retry it
├── DeadlineExceeded       the request's own deadline has passed; it holds nothing any more
├── WaitedTooLong          the request did not start within `max_wait_s`; retry later
├── EngineFull             more requests wait than `max_waiting`; retry later
├── WarmUpFailed           the engine could not compute its first tokens; raised at start
└── EngineStopped          the engine has stopped or its device computes nothing; retry on another replica
"""

from __future__ import annotations


class GpuWorkerError(Exception):
    """Base class of everything `gpu_worker` raises on purpose."""


class BaseModelUnsupported(GpuWorkerError):
    """The base model needs something this engine does not have."""


class WorkerConfigInvalid(GpuWorkerError):
    """A worker setting is out of its range."""


class PromptInvalid(GpuWorkerError):
    """The messages cannot be rendered."""


class PromptTooLong(GpuWorkerError):
    """Shorten the prompt or ask for fewer new tokens."""


class SamplingInvalid(GpuWorkerError):
    """A sampling parameter is out of its range; `param` names it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class PlanTooLarge(GpuWorkerError):
    """Ask for fewer adapters."""


class AdapterUnfit(GpuWorkerError):
    """The adapter was made for another base model."""


class AdapterLoadFailed(GpuWorkerError):
    """The adapter's weights could not be fetched. Retry later."""


class LogitsNotFinite(GpuWorkerError):
    """The plan's adapters drive the model out of range. Use smaller weights or other adapters."""


class RequestFailed(GpuWorkerError):
    """The request raises in every step it takes part in, beside others and alone. Change it; a retry fails again."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return (
            "the model failed to compute this request, also by itself, and it is not retried; change the request, or"
            f" look for {self.request_id} in the worker's log"
        )


class DeadlineExceeded(GpuWorkerError):
    """Ask for less, or allow more time."""

    param = "timeout_s"

    def __init__(self, num_new_tokens: int) -> None:
        super().__init__(num_new_tokens)
        self.num_new_tokens = num_new_tokens

    def __str__(self) -> str:
        return f"the request's time was over after {self.num_new_tokens} new tokens"


class WaitedTooLong(GpuWorkerError):
    """The server has too much to do. Retry later."""

    def __init__(self, max_wait_s: float) -> None:
        super().__init__(max_wait_s)
        self.max_wait_s = max_wait_s

    def __str__(self) -> str:
        return f"the request waited {self.max_wait_s:g} s and could not start; try again later"


class EngineFull(GpuWorkerError):
    """Too many requests wait. Retry later."""


class WarmUpFailed(GpuWorkerError):
    """The engine could not compute its first tokens on this device. The cause says what is missing."""


class EngineStopped(GpuWorkerError):
    """This engine has ended, or its device computes nothing. Retry on another replica."""
