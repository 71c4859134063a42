"""Real steps before the first request: an engine that cannot compute them must not report ready."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import torch

from gpu_worker.engine import Engine
from gpu_worker.errors import WarmUpFailed
from gpu_worker.fitting import FittedAdapter
from gpu_worker.request import Delta, Job, SamplingParams
from gpu_worker.row import Row
from lora_store.adapter import AdapterRef, AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter, Strategy

_DIGEST = "warm-up"  # no adapter has it: digests are hexadecimal
_NUM_PROMPT_TOKENS, _NUM_NEW_TOKENS = 8, 3
_NUM_ROWS = 3
_MAX_STEP_TOKENS = 5  # so that the prompts are read in chunks
_MAX_STEPS = 100  # it takes about ten
_GREEDY = SamplingParams(max_tokens=_NUM_NEW_TOKENS, temperature=0, ignore_eos=True)
_DRAWN = SamplingParams(
    max_tokens=_NUM_NEW_TOKENS, top_p=0.9, top_k=20, logprobs=1, presence_penalty=0.5, seed=0, ignore_eos=True
)


def warmed_up(engine: Engine) -> Engine:
    """Return the engine once it has computed prompt chunks and decode steps, without and with an adapter.

    The tokens are chosen greedily and drawn, and the adapter is a synthetic one. So the device also loads its kernels
    before the first request needs them. Nothing of it is left: no KV, no adapter, no count.
    Raises: WarmUpFailed, with the first error as its cause.
    """
    counters = engine.counters.copy()
    loaded = _synthetic(engine)
    events: list[Delta | Exception] = []
    for plan, sampling in zip((BASE_PLAN, _plan("mixture"), _plan("fusion")), (_GREEDY, _DRAWN, _GREEDY), strict=True):
        engine.submit(_row(engine, plan, sampling, loaded, events))
    for _ in range(_MAX_STEPS):
        if not engine.has_work:
            break
        engine.step(max_tokens=_MAX_STEP_TOKENS)
        _check(events)
    _check_ends(events)
    engine.forget([_DIGEST])
    engine.counters = counters
    return engine


def _check(events: list[Delta | Exception]) -> None:
    """Raises: WarmUpFailed."""
    for event in events:
        if isinstance(event, Exception):
            cause = event.__cause__ or event
            raise WarmUpFailed(f"the first steps failed: {cause}") from cause


def _check_ends(events: list[Delta | Exception]) -> None:
    """Raises: WarmUpFailed."""
    num_ended = sum(isinstance(event, Delta) and event.finish_reason is not None for event in events)
    if num_ended != _NUM_ROWS:
        raise WarmUpFailed(f"the first {_MAX_STEPS} steps ended {num_ended} of {_NUM_ROWS} answers")


def _row(
    engine: Engine,
    plan: Plan,
    sampling: SamplingParams,
    loaded: Future[FittedAdapter],
    events: list[Delta | Exception],
) -> Row:
    """Prepare a request that fits any context; its adapter is at hand."""
    num_new = min(_NUM_NEW_TOKENS, engine.max_len - 1)
    tokens = list(range(min(_NUM_PROMPT_TOKENS, engine.max_len - num_new)))
    job = Job("warm-up", "", plan, replace(sampling, max_tokens=num_new))
    row = engine.prepare.of_tokens(job, tokens, events.append, keep_logits=True)
    row.loads = {digest: loaded for digest in row.weights_digests}
    return row


def _plan(strategy: Strategy) -> Plan:
    return Plan(strategy, (PlannedAdapter(AdapterRef("warm-up", "warm-up", _DIGEST), _DIGEST, 1.0),))


def _synthetic(engine: Engine) -> Future[FittedAdapter]:
    """An adapter of rank 1 for every module of the bank, so small that it drives nothing out of range."""
    modules = {
        name: ModuleWeights(torch.full((1, num_in), 1e-3), torch.full((num_out, 1), 1e-3), 1.0)
        for name, (num_out, num_in) in engine.bank.shapes.items()
    }
    loaded: Future[FittedAdapter] = Future()
    loaded.set_result(engine.bank.fit(AdapterWeights(_DIGEST, modules)))
    return loaded
