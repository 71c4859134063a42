"""Run real steps before the first request, so that a broken engine does not report ready."""

from __future__ import annotations

from concurrent.futures import Future

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.errors import WarmUpFailed
from gpu_worker.front.request.request import Delta
from gpu_worker.native.checks.synthetic_rows import DIGEST, NUM_ROWS, synthetic_adapter, synthetic_rows
from gpu_worker.native.loop import Engine

_NUM_PROMPT_TOKENS, _NUM_NEW_TOKENS = 8, 3
_MAX_STEP_TOKENS = 5  # splits the prompts into chunks
_MAX_STEPS = 100  # about ten are needed


def warm_up(engine: Engine) -> Engine:
    """Compute prompt chunks and decode steps, without and with a synthetic adapter, and return the engine.

    Tokens are chosen greedily and by sampling. This also loads the device's kernels before the first request.
    Afterwards the engine is unchanged: no KV, adapter or count remains.
    Raises: WarmUpFailed, with the first error as its cause.
    """
    counters = engine.counters.copy()
    loaded: Future[DeviceAdapter] = Future()
    loaded.set_result(synthetic_adapter(engine.bank))
    events: list[Delta | Exception] = []
    num_new = min(_NUM_NEW_TOKENS, engine.max_len - 1)
    num_prompt = min(_NUM_PROMPT_TOKENS, engine.max_len - num_new)
    for row in synthetic_rows(engine.prepare, num_prompt, num_new, events.append):
        row.loads = {digest: loaded for digest in row.weights_digests}
        engine.submit(row)
    for _ in range(_MAX_STEPS):
        if not engine.has_work:
            break
        engine.step(max_tokens=_MAX_STEP_TOKENS)
        _check(events)
    _check_ends(events)
    engine.queue.forget([DIGEST])
    engine.queue.counters = counters
    return engine


def _check(events: list[Delta | Exception]) -> None:
    """Raise WarmUpFailed if an event is an error."""
    for event in events:
        if isinstance(event, Exception):
            cause = event.__cause__ or event
            raise WarmUpFailed(f"the first steps of the engine failed: {cause}") from cause


def _check_ends(events: list[Delta | Exception]) -> None:
    """Raise WarmUpFailed unless all rows have ended."""
    num_ended = sum(isinstance(event, Delta) and event.finish_reason is not None for event in events)
    if num_ended != NUM_ROWS:
        raise WarmUpFailed(f"after {_MAX_STEPS} steps only {num_ended} of {NUM_ROWS} answers were complete")
