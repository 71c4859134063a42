"""Bounds on requests and on adapters, which are constants of the code, and of which two are settings."""

from __future__ import annotations

from deployments.api import adapters, base, completions, messages, structured
from deployments.api.base import MAX_LABEL_CHARS, MAX_TEXT_CHARS
from deployments.config.parts import AdmissionSettings
from docs.generate.markdown import code, table
from docs.generate.settings import find_meanings
from gpu_worker.front.request import request
from lora_store import names
from lora_store.bounded_files import Limits


def folder_limits() -> str:
    """Return the bounds on an adapter's folder."""
    limits = Limits()
    rows = [
        (
            text,
            _number(getattr(limits, name)),
            code(f"admission.{name}") if name in AdmissionSettings.model_fields else "",
        )
        for name, text in find_meanings(Limits).items()
    ]
    return table(("bound on", "value", "setting that changes it"), rows)


def request_limits() -> str:
    """Return the bounds on requests."""
    rows = [
        ("prompts of one `/v1/completions`", completions.MAX_PROMPTS),
        ("choices of one prompt (`n`)", completions.MAX_CHOICES),
        ("rows of one request: prompts times `n`", completions.MAX_ROWS),
        ("prompts of one `/v1/route`", completions.MAX_QUERIES),
        ("prompts of one `/v1/pool/doctor`", adapters.MAX_DOCTOR_PROMPTS),
        ("messages of one chat", completions.MAX_MESSAGES),
        ("text parts of one message", messages.MAX_PARTS),
        ("tools of one chat, and calls of one message", messages.MAX_TOOLS),
        ("levels of objects and lists in one JSON schema", structured.MAX_SCHEMA_DEPTH),
        ("characters of one text", MAX_TEXT_CHARS),
        ("characters of `user`, `safety_identifier`, `prompt_cache_key` and a message's `name`", MAX_LABEL_CHARS),
        ("entries of `metadata`", completions.MAX_METADATA),
        ("entries of `logit_bias`", request.MAX_BIASED_IDS),
        ("alternatives in `logprobs` and `top_logprobs`", request.MAX_LOGPROBS),
        (
            "log probabilities of an answer that is not a stream: one for each token of all rows, and one for each"
            " alternative",
            completions.MAX_ANSWER_LOGPROBS,
        ),
        ("`stop` strings", request.MAX_STOPS),
        ("characters of one `stop` string", request.MAX_STOP_CHARS),
        ("alternatives in `prompt_logprobs`", request.MAX_LOGPROBS),
        ("token ids of one prompt", completions.MAX_TOKEN_IDS),
        ("new tokens that quotas reserve for an answer without `max_tokens`", request.EXPECTED_NEW_TOKENS),
        ("adapters of one plan", base.MAX_ADAPTERS),
        ("adapters published by one request", adapters.MAX_BATCH),
        ("files of one upload", adapters.MAX_UPLOAD_FILES),
        ("tags of one adapter", adapters.MAX_TAGS),
        ("model names of one tenant", names.MAX_NAMES),
        ("kept policies of one model name", names.KEPT_POLICIES),
        ("characters of one policy, as JSON", names.MAX_POLICY_CHARS),
    ]
    return table(("bound on", "value"), [(text, _number(value)) for text, value in rows])


def _number(value: int) -> str:
    if value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value:,} ({value >> 20} Mi)"
    return f"{value:,}"
