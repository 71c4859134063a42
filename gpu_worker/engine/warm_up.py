"""Real steps before the first request: an engine that cannot compute them must not report ready."""

from __future__ import annotations

from concurrent.futures import Future

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.synthetic_rows import DIGEST, NUM_ROWS, synthetic_adapter, synthetic_rows
from gpu_worker.errors import WarmUpFailed
from gpu_worker.request.request import Delta

_NUM_PROMPT_TOKENS, _NUM_NEW_TOKENS = 8, 3
_MAX_STEP_TOKENS = 5  # so that the prompts are read in chunks
_MAX_STEPS = 100  # it takes about ten


def warm_up(engine: Engine) -> Engine:
    """Return the engine once it has computed prompt chunks and decode steps, without and with an adapter.

    The tokens are chosen greedily and drawn, and the adapter is a synthetic one. So the device also loads its kernels
    before the first request needs them. Nothing of it is left: no KV, no adapter, no count.
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
    engine.forget([DIGEST])
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
    if num_ended != NUM_ROWS:
        raise WarmUpFailed(f"the first {_MAX_STEPS} steps ended {num_ended} of {NUM_ROWS} answers")
