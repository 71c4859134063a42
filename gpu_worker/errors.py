"""Errors of the worker.

GpuWorkerError
├── BaseModelUnsupported   the engine does not support the base model; raised at start
├── WorkerConfigInvalid    a setting is out of range; raised at start
├── PromptInvalid          the prompt cannot be rendered or tokenized
├── PromptTooLong          prompt and new tokens exceed `max_model_len`
├── SamplingInvalid        a sampling parameter is out of range
├── GrammarInvalid         the grammar of the answer cannot be compiled
├── GrammarFailed          the grammar needs too much time or memory while the answer is generated
├── PlanTooLarge           the plan's adapters need more rank rows than the bank has
├── AdapterUnfit           the adapter's tensors do not match the base model
├── AdapterLoadFailed      the weights could not be fetched; only requests that need them fail
├── LogitsNotFinite        the plan produces non-finite logits; only its own request fails
├── RequestFailed          the request fails in every step; do not retry it
├── DeadlineExceeded       the request's deadline has passed; its resources are free
├── WaitedTooLong          the request did not start within `max_wait_s`; retry later
├── EngineFull             the queue has `max_waiting` requests; retry later
├── WarmUpFailed           the engine could not compute its first tokens; raised at start
└── EngineStopped          the engine has stopped or its device is broken; retry on another replica
"""

from __future__ import annotations


class GpuWorkerError(Exception):
    """Base class of the errors that `gpu_worker` raises."""


class BaseModelUnsupported(GpuWorkerError):
    """The engine does not support the base model."""


class WorkerConfigInvalid(GpuWorkerError, ValueError):
    """A worker setting is out of range. A ValueError, so that pydantic reports it with the setting's path."""


class PromptInvalid(GpuWorkerError):
    """The prompt cannot be rendered or tokenized."""


class PromptTooLong(GpuWorkerError):
    """Prompt and new tokens exceed the context. Shorten the prompt or request fewer tokens.

    `param`: the request's field, if it is known.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class SamplingInvalid(GpuWorkerError):
    """A sampling parameter is out of range; `param` names it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class GrammarInvalid(GpuWorkerError):
    """The grammar cannot be compiled. Change it.

    `pointer`: JSON pointer of the invalid part of a schema; `param`: the request's field that has the grammar.
    """

    def __init__(self, message: str, pointer: str = "", param: str | None = None) -> None:
        super().__init__(message, pointer, param)
        self.message, self.pointer, self.param = message, pointer, param

    def __str__(self) -> str:
        place = f" at {self.pointer}" if self.pointer else ""
        return f"{self.param or 'the grammar'}{place} cannot be compiled: {self.message}"


class GrammarFailed(GpuWorkerError):
    """The grammar needs too much time or memory while the answer is generated. Use a simpler one."""


class PlanTooLarge(GpuWorkerError):
    """The adapters of the plan exceed the bank. Use fewer adapters."""


class AdapterUnfit(GpuWorkerError):
    """The adapter's tensors do not match the base model."""


class AdapterLoadFailed(GpuWorkerError):
    """The adapter's weights could not be fetched. Retry later."""


class LogitsNotFinite(GpuWorkerError):
    """The plan produces non-finite logits. Use smaller weights or other adapters."""


class RequestFailed(GpuWorkerError):
    """The request fails in every step, in a batch and alone. Change it; a retry would fail again."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return (
            "the model failed to compute this request, also without other requests; a retry would fail again. Change"
            f" the request, or search the worker's log for {self.request_id}"
        )


class DeadlineExceeded(GpuWorkerError):
    """The request's deadline has passed. Request fewer tokens or allow more time."""

    param = "timeout_s"

    def __init__(self, num_new_tokens: int) -> None:
        super().__init__(num_new_tokens)
        self.num_new_tokens = num_new_tokens

    def __str__(self) -> str:
        return f"timeout_s was reached after {self.num_new_tokens} new tokens; request fewer tokens or raise timeout_s"


class WaitedTooLong(GpuWorkerError):
    """The request did not start in time because the server is overloaded. Retry later."""

    def __init__(self, max_wait_s: float) -> None:
        super().__init__(max_wait_s)
        self.max_wait_s = max_wait_s

    def __str__(self) -> str:
        return f"the request waited {self.max_wait_s:g} s in the queue without starting; retry later"


class EngineFull(GpuWorkerError):
    """The queue is full. Retry later."""


class WarmUpFailed(GpuWorkerError):
    """The engine could not compute its first tokens on this device. The cause names the reason."""


class EngineStopped(GpuWorkerError):
    """The engine has stopped, or its device is broken. Retry on another replica."""
