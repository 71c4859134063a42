"""Check the limits of a request before any work is done for it, and estimate its work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from deployments.api.completions import CHARS_PER_TOKEN, GenerationRequest, Question
from deployments.api.requested_work import Work
from deployments.config.app import AppConfig
from deployments.errors import RequestInvalid
from gpu_worker.errors import PromptTooLong
from gpu_worker.request.prompts import Message
from gpu_worker.request.request import MAX_CHARS_PER_TOKEN
from retriever_svc.encoder import tokens_read


def check_limits(request: GenerationRequest, questions: Sequence[Question], config: AppConfig) -> None:
    """Raises: PromptTooLong, RequestInvalid. Tokens are counted by the Worker; this bounds what it has to look at."""
    _check_chars(max(_num_chars(question.prompt) for question in questions), config)
    wanted = request.token_limit
    if wanted is not None and wanted > config.max_new_tokens:
        raise RequestInvalid(f"max_tokens: at most {config.max_new_tokens}, got {wanted}", "max_tokens")


def check_texts(texts: Iterable[str], config: AppConfig) -> None:
    """Refuse what could not be a prompt either. Raises: PromptTooLong."""
    _check_chars(max(map(len, texts)), config)


def refuse_stream_options(request: GenerationRequest) -> None:
    """Reject `stream_options` on a request that is not streamed. Raises: RequestInvalid."""
    if request.stream_options is not None:
        raise RequestInvalid("stream_options applies to streams only; set stream: true or remove it", "stream_options")


def encoder_tokens(texts: Iterable[str]) -> int:
    """Return about how many tokens of the texts the encoder reads, which is what a key is charged for them."""
    return sum(map(tokens_read, texts))


def prompt_tokens(prompt: str | tuple[Message, ...]) -> int:
    """Return about how many tokens a prompt has: a quarter of its characters, rounded up."""
    return math.ceil(_num_chars(prompt) / CHARS_PER_TOKEN)


def work_of(request: GenerationRequest, questions: Sequence[Question], texts_read: Iterable[str]) -> Work:
    """Return how much a request asks for whose adapters the encoder finds by `texts_read`."""
    return Work(
        num_rows=len(questions) * request.n,
        num_tokens=request.most_tokens,
        num_read=encoder_tokens(texts_read),
        rows_field="n" if request.n > 1 else "prompt",
        tokens_field="max_tokens",
    )


def _check_chars(num_chars: int, config: AppConfig) -> None:
    context = config.worker.max_model_len
    if num_chars > context * MAX_CHARS_PER_TOKEN:
        raise PromptTooLong(f"a prompt of {num_chars} characters does not fit a context of {context} tokens")


def _num_chars(prompt: str | tuple[Message, ...]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
