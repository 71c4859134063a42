"""Rows created without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_worker.front.request.request import SamplingParams
from gpu_worker.front.row import Row
from gpu_worker.front.text.incremental_detokenizer import IncrementalDetokenizer
from gpu_worker.front.text.token_bytes import TokenBytes
from lora_store.adapter import AdapterRef
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter
from tests.tiny import byte_tokenizer

BYTES = byte_tokenizer().backend_tokenizer


def row_of(*, tokens: Sequence[int] = (256,), stops: Sequence[str] = (), **changes: Any) -> Row:
    """Return a row whose prompt is `tokens` and whose answer is one token, with the changes."""
    settings: dict[str, Any] = {
        "request_id": "1",
        "plan": BASE_PLAN,
        "sampling": SamplingParams(),
        "max_new_tokens": 1,
        "end_ids": frozenset(),
        "seed": 0,
        "detokenizer": IncrementalDetokenizer(BYTES, stops),
        "sink": lambda event: None,
        "token_bytes": TokenBytes(BYTES),
    }
    return Row(**{**settings, "tokens": list(tokens), "num_prompt_tokens": len(tokens), **changes})


def queued_row(adapters: str, tenant: str = "local", number: int = 0) -> Row:
    """Return a row whose adapters have one-letter digests."""
    planned = tuple(PlannedAdapter(AdapterRef(tenant, letter, letter), letter, 1.0) for letter in adapters)
    plan = Plan("mixture", planned) if planned else BASE_PLAN
    return row_of(request_id=f"{tenant}/{adapters}{number}", plan=plan, tenant=tenant)
