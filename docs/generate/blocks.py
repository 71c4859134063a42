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
from docs.generate.models import families, vllm_files
from docs.generate.request_fields import (
    chat_fields,
    completion_fields,
    lora_fields,
    messages_fields,
    refused_fields,
    responses_fields,
    route_fields,
)
from docs.generate.scale import fleet_queues, fleet_texts, scale_costs, scale_needs
from docs.generate.settings import settings
from docs.generate.strategies import strategies, weightings

BLOCKS: Mapping[str, Block] = {
    **BENCHMARK_BLOCKS,
    "chat-fields": chat_fields,
    "clients": clients,
    "commands": commands,
    "completion-fields": completion_fields,
    "error-codes": error_codes,
    "families": families,
    "fleet-queues": fleet_queues,
    "fleet-texts": fleet_texts,
    "folder-limits": folder_limits,
    "lora-fields": lora_fields,
    "metrics": metrics,
    "refused-fields": refused_fields,
    "request-limits": request_limits,
    "messages-fields": messages_fields,
    "responses-fields": responses_fields,
    "route-fields": route_fields,
    "scale-costs": scale_costs,
    "scale-needs": scale_needs,
    "settings": settings,
    "strategies": strategies,
    "vllm-files": vllm_files,
    "weightings": weightings,
}
