"""What a request may ask for at most, checked before any work is done for it."""

from __future__ import annotations

from deployments.config import AppConfig
from deployments.errors import RequestInvalid
from deployments.schemas import ChatCompletionRequest, CompletionRequest
from gpu_worker.errors import PromptTooLong
from gpu_worker.prepare import MAX_CHARS_PER_TOKEN


def check_limits(request: ChatCompletionRequest | CompletionRequest, config: AppConfig) -> None:
    """Raises: PromptTooLong, RequestInvalid. Tokens are counted by the Worker; this bounds what it has to look at."""
    context = config.worker.max_model_len
    prompt = request.prompt_for_worker
    num_chars = len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
    if num_chars > context * MAX_CHARS_PER_TOKEN:
        raise PromptTooLong(f"a prompt of {num_chars} characters does not fit a context of {context} tokens")
    wanted = request.token_limit
    if wanted is not None and wanted > config.max_new_tokens:
        raise RequestInvalid(f"max_tokens: at most {config.max_new_tokens}, got {wanted}", "max_tokens")
