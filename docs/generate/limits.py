"""Bounds that are constants of the code, not settings."""

from __future__ import annotations

from dataclasses import fields

from deployments.api import adapters, base, completions, messages
from deployments.api.base import MAX_LABEL_CHARS, MAX_TEXT_CHARS
from docs.generate.markdown import table
from gpu_worker.request import request
from lora_store.bounded_files import Limits

_FOLDER_TEXTS = {
    "max_files": "files in an adapter's folder",
    "max_config_bytes": "bytes of `adapter_config.json`",
    "max_weights_bytes": "bytes of `adapter_model.safetensors`; no setting changes it",
    "max_header_bytes": "bytes of the weights file's header",
    "max_tensors": "tensors in the weights file",
    "max_template_bytes": "bytes of `chat_template.jinja`",
    "max_samples": "lines of `lora_samples.jsonl` that are read, spread evenly over more",
    "max_sample_bytes": "bytes of one sample's input, which is cut there, of its output, and of `description.txt`",
    "max_rank": "rank of a module",
    "max_patterns": "entries of `rank_pattern` and of `alpha_pattern`",
    "max_reasons": "reasons that one refusal names",
}


def folder_limits() -> str:
    """Return the bounds on an adapter's folder. Raises: KeyError for a bound without a text."""
    limits = Limits()
    rows = [(_FOLDER_TEXTS[field.name], _number(getattr(limits, field.name))) for field in fields(Limits)]
    return table(("bound on", "at most"), rows)


def request_limits() -> str:
    """Return the bounds on requests."""
    rows = [
        ("prompts of one `/v1/completions`", completions.MAX_PROMPTS),
        ("choices of one prompt (`n`)", completions.MAX_CHOICES),
        ("rows of one request: prompts times `n`", completions.MAX_ROWS),
        ("prompts of one `/v1/route`", completions.MAX_QUERIES),
        ("messages of one chat", completions.MAX_MESSAGES),
        ("text parts of one message", messages.MAX_PARTS),
        ("tools of one chat, and calls of one message", messages.MAX_TOOLS),
        ("characters of one text", MAX_TEXT_CHARS),
        ("characters of `user`, `safety_identifier`, `prompt_cache_key` and a message's `name`", MAX_LABEL_CHARS),
        ("entries of `metadata`", completions.MAX_METADATA),
        ("entries of `logit_bias`", request.MAX_BIASED_IDS),
        ("alternatives in `logprobs` and `top_logprobs`", request.MAX_LOGPROBS),
        ("`stop` strings", request.MAX_STOPS),
        ("characters of one `stop` string", request.MAX_STOP_CHARS),
        ("alternatives in `prompt_logprobs`", request.MAX_LOGPROBS),
        ("token ids of one prompt", completions.MAX_TOKEN_IDS),
        ("new tokens that quotas reserve for an answer without `max_tokens`", request.EXPECTED_NEW_TOKENS),
        ("adapters of one plan", base.MAX_ADAPTERS),
        ("adapters published by one request", adapters.MAX_BATCH),
        ("tags of one adapter", adapters.MAX_TAGS),
    ]
    return table(("bound on", "value"), [(text, _number(value)) for text, value in rows])


def _number(value: int) -> str:
    if value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value:,} ({value >> 20} Mi)"
    return f"{value:,}"
