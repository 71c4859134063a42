"""Errors of the worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lora_store.error_kinds import RETRY_LATER, FieldError, Kind, ReportedError


class GpuWorkerError(ReportedError):
    """Base class of the errors that `gpu_worker` raises."""


class BaseModelUnsupported(GpuWorkerError):
    """The engine does not support the base model. Raised at start."""


class WorkerConfigInvalid(GpuWorkerError, ValueError):
    """A worker setting is out of range. Raised at start.

    It is a ValueError, so that pydantic reports it with the setting's path.
    """


class PromptInvalid(GpuWorkerError):
    """The prompt cannot be rendered by the base model's chat template, or cannot be tokenized."""

    kind = Kind.INVALID
    code = "invalid_prompt"
    remedy = "Change the messages, for example the order of roles."


class PromptTooLong(GpuWorkerError, FieldError):
    """Prompt and new tokens together exceed `worker.max_model_len`."""

    kind = Kind.INVALID
    code = "context_length_exceeded"
    remedy = "Shorten the prompt or lower `max_tokens`."

    @classmethod
    def of(cls, length: str, max_len: int, max_tokens: int | None = None) -> Self:
        """Return the error for a prompt of this length, such as "9 tokens".

        LiteLLM and agents recognise it by these words, which are OpenAI's and Anthropic's, and not by the code.
        `max_tokens`: the new tokens that it has no room for, if it has room for fewer.
        """
        wanted, lower = ("", "") if max_tokens is None else (f" for max_tokens {max_tokens}", " or lower max_tokens")
        return cls(
            f"the prompt is too long{wanted}: this model's maximum context length is {max_len} tokens, and the prompt"
            f" has {length}; shorten it{lower}"
        )


class SamplingInvalid(GpuWorkerError, FieldError):
    """A sampling parameter is out of its range. `param` names it."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Correct that field."


@dataclass(eq=False)
class GrammarInvalid(GpuWorkerError):
    """The schema, regular expression or grammar of the answer cannot be compiled, or needs too much time or memory.

    `pointer`: JSON pointer of the invalid part of a schema; `param`: the request's field that has the grammar.
    """

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = (
        "The message names the field, the JSON pointer inside a schema, and the reason. Remove or replace that part."
    )

    message: str
    pointer: str = ""
    param: str | None = None

    def __str__(self) -> str:
        place = f" at {self.pointer}" if self.pointer else ""
        return f"{self.param or 'the grammar'}{place} cannot be compiled: {self.message}"


class GrammarFailed(GpuWorkerError):
    """The grammar became too complex while the answer was generated."""

    kind = Kind.UNANSWERABLE
    code = "request_failed"
    remedy = "Use a simpler grammar."


class PlanTooLarge(GpuWorkerError):
    """The plan's adapters have more rank rows together than the bank (`worker.bank_rank_rows`), or more bytes for
    experts than it keeps (`worker.host_cache_bytes`). With vLLM, the widest adapter of a fusion has more than the rows
    for fusions (`worker.fusion_rank_rows`)."""

    kind = Kind.INVALID
    code = "invalid_request"
    remedy = "Use fewer adapters, or a larger bank. For a fusion use adapters of lower rank, or more rows for fusions."


class AdapterUnfit(GpuWorkerError):
    """The adapter's tensors do not match the base model."""

    kind = Kind.INVALID
    code = "adapter_incompatible"
    remedy = "Name another adapter, or publish one that was trained on this base."


class AdapterLoadFailed(GpuWorkerError):
    """A worker could not fetch the adapter's weights."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = "Retry after `Retry-After` seconds. If it persists, run `loraretriever pool verify`."


class AdapterLost(AdapterLoadFailed):
    """The adapter was withdrawn, or its stored weights are damaged or cannot be converted."""

    remedy = "Name another adapter, or publish this one again."


class LogitsNotFinite(GpuWorkerError):
    """The plan's adapters drive the model out of the number range."""

    kind = Kind.UNANSWERABLE
    code = "request_failed"
    remedy = "Use smaller weights or other adapters."


@dataclass(eq=False)
class RequestFailed(GpuWorkerError):
    """The model failed to compute this request, also by itself."""

    kind = Kind.BROKEN
    code = "request_failed"
    remedy = "Change the request; repeating it fails again. The worker's log has the cause."
    text = (
        "the model failed to compute this request, also without other requests; a retry would fail again. Change"
        " the request, or search the worker's log for {self.request_id}"
    )

    request_id: str


@dataclass(eq=False)
class DeadlineExceeded(GpuWorkerError):
    """The answer was not complete within `timeout_s` or `max_request_s`."""

    kind = Kind.LATE
    code = "deadline_exceeded"
    remedy = "Request fewer tokens or allow more time."
    param = "timeout_s"
    text = "timeout_s was reached after {self.num_new_tokens} new tokens; request fewer tokens or raise timeout_s"

    num_new_tokens: int


@dataclass(eq=False)
class WaitedTooLong(GpuWorkerError):
    """The request could not start within `worker.max_wait_s`."""

    kind = Kind.BUSY
    code = "overloaded"
    remedy = RETRY_LATER
    text = "the request waited {self.max_wait_s:g} s in the queue without starting; retry later"

    max_wait_s: float


class EngineFull(GpuWorkerError):
    """A queue is full: the worker's (`worker.max_waiting`), or that of lists, reports of usage or checked policies."""

    kind = Kind.BUSY
    code = "overloaded"
    remedy = RETRY_LATER


class WarmUpFailed(GpuWorkerError):
    """The engine could not compute its first tokens on this device. Raised at start; its cause names the reason."""


class EngineStopped(GpuWorkerError):
    """The worker is stopping, or its device no longer computes."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"
    remedy = "Retry after `Retry-After` seconds. Another worker answers."
