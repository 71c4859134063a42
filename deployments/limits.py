"""What a request may ask for at most, checked before any work is done for it."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.config import AppConfig
from deployments.errors import RequestInvalid
from deployments.schemas import GenerationRequest, Question
from gpu_worker.errors import PromptTooLong
from gpu_worker.prompts import Message
from gpu_worker.request import MAX_CHARS_PER_TOKEN


def check_limits(request: GenerationRequest, questions: Sequence[Question], config: AppConfig) -> None:
    """Raises: PromptTooLong, RequestInvalid. Tokens are counted by the Worker; this bounds what it has to look at."""
    context = config.worker.max_model_len
    num_chars = max(_num_chars(question.prompt) for question in questions)
    if num_chars > context * MAX_CHARS_PER_TOKEN:
        raise PromptTooLong(f"a prompt of {num_chars} characters does not fit a context of {context} tokens")
    wanted = request.token_limit
    if wanted is not None and wanted > config.max_new_tokens:
        raise RequestInvalid(f"max_tokens: at most {config.max_new_tokens}, got {wanted}", "max_tokens")


def _num_chars(prompt: str | tuple[Message, ...]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
