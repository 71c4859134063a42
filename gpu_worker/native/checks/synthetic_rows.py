"""Make the engine's own requests, with a synthetic adapter, to test whether its device computes correctly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.request import Job, SamplingParams
from gpu_worker.front.row import Row, Sink
from lora_store.adapter import AdapterRef, AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter
from lora_store.strategies.registry import Strategy

DIGEST = "synthetic"  # not a valid digest: digests are hexadecimal
NUM_ROWS = 3
_NUM_TOKEN_IDS = 8  # ids 0 to 7 exist in every vocabulary
_GREEDY = SamplingParams(temperature=0, ignore_eos=True)
_DRAWN = SamplingParams(top_p=0.9, top_k=20, logprobs=1, presence_penalty=0.5, seed=0, ignore_eos=True)


def synthetic_rows(prepare: RequestPreprocessor, num_prompt_tokens: int, num_new_tokens: int, sink: Sink) -> list[Row]:
    """Make one row without and two with the synthetic adapter; one row samples, the others are greedy."""

    def row(plan: Plan, sampling: SamplingParams) -> Row:
        job = Job(DIGEST, "", plan, replace(sampling, max_tokens=num_new_tokens))
        tokens = [number % _NUM_TOKEN_IDS for number in range(num_prompt_tokens)]
        return prepare.of_tokens(job, tokens, sink, capture_first_logits=True)

    return [row(BASE_PLAN, _GREEDY), row(_plan("mixture"), _DRAWN), row(_plan("fusion"), _GREEDY)]


def synthetic_adapter(bank: LoraBank) -> DeviceAdapter:
    """Make an adapter of rank 1 for every module of the bank, with weights too small to overflow."""
    modules = {
        name: ModuleWeights(torch.full((*num, 1, num_in), 1e-3), torch.full((*num, num_out, 1), 1e-3), 1.0)
        for name, (num_out, num_in, *num) in bank.shapes.items()
    }
    return bank.to_device_layout(AdapterWeights(DIGEST, modules))


def without_adapter(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without an adapter."""
    return [row for row in rows if not row.plan.adapters]


def _plan(strategy: Strategy) -> Plan:
    return Plan(strategy, (PlannedAdapter(AdapterRef(DIGEST, DIGEST, DIGEST), DIGEST, 1.0),))
