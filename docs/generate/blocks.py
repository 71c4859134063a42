"""The functions that write the generated blocks."""

from __future__ import annotations

from collections.abc import Mapping

from docs.generate.benchmark_numbers import BENCHMARK_BLOCKS
from docs.generate.clients import clients
from docs.generate.commands import commands
from docs.generate.error_codes import error_codes
from docs.generate.limits import folder_limits, request_limits
from docs.generate.markdown import Block
from docs.generate.metrics import metrics
from docs.generate.models import equal_families, refused_families
from docs.generate.request_fields import (
    chat_fields,
    completion_fields,
    lora_fields,
    messages_fields,
    refused_fields,
    responses_fields,
    route_fields,
)
from docs.generate.scale import scale_costs, scale_formula, scale_measured, scale_needs
from docs.generate.settings import settings
from docs.generate.strategies import strategies, weightings

BLOCKS: Mapping[str, Block] = {
    **BENCHMARK_BLOCKS,
    "chat-fields": chat_fields,
    "clients": clients,
    "commands": commands,
    "completion-fields": completion_fields,
    "equal-families": equal_families,
    "error-codes": error_codes,
    "folder-limits": folder_limits,
    "lora-fields": lora_fields,
    "metrics": metrics,
    "refused-families": refused_families,
    "refused-fields": refused_fields,
    "request-limits": request_limits,
    "messages-fields": messages_fields,
    "responses-fields": responses_fields,
    "route-fields": route_fields,
    "scale-costs": scale_costs,
    "scale-formula": scale_formula,
    "scale-measured": scale_measured,
    "scale-needs": scale_needs,
    "settings": settings,
    "strategies": strategies,
    "weightings": weightings,
}
