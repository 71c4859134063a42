"""Distinguish a broken device from requests that cannot be computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.errors import EngineStopped
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.request import Job
from gpu_worker.front.row import Row
from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.attention.kv_cache import KvCache
from gpu_worker.native.checks.synthetic_rows import DIGEST, synthetic_adapter, synthetic_rows, without_adapter
from gpu_worker.native.forward import ForwardPass
from gpu_worker.native.next_tokens import Chosen
from gpu_worker.native.scheduler import Scheduled

logger = logging.getLogger(__name__)

NOTHING_COMPUTED = "the worker's device fails to compute a single token"
_NO_REQUESTS = "the worker's device fails to compute the engine's own requests"
_MAX_STEPS = 3  # one may be another process's memory peak; three in a row mean a broken device


class DeviceCheck:
    """A check that runs the engine's own requests after steps in which no request was computed.

    After each such step it computes a single token of the base model. After three in a row it computes a prompt chunk
    of the failed length and a decode token, without and with an adapter: if the device computes only single tokens,
    requests must not be blamed forever. `compute`: computes one step, as the engine does.
    """

    def __init__(
        self,
        forward: ForwardPass,
        compute: Callable[[Sequence[Scheduled]], Chosen],
        prepare: RequestPreprocessor,
        bank: LoraBank,
        residency: Residency,
        kv_cache: KvCache,
    ) -> None:
        self._forward, self._compute, self._prepare = forward, compute, prepare
        self._bank, self._residency, self._kv_cache = bank, residency, kv_cache
        self._token_row = prepare.of_tokens(Job("probe", ""), [0], lambda event: None)
        self._num_failed = 0  # consecutive steps without a computed request
        self._num_broken = 0  # consecutive steps in which the single token failed too
        self._failure: str | None = None

    def reset(self) -> None:
        """Reset the counts after a computed request."""
        self._num_failed = self._num_broken = 0

    def works(self, num_tokens: int) -> bool:
        """Return whether the device works, so that the requests of the failed step are to blame.

        num_tokens: tokens of that step's longest segment. Its rows have been freed.
        Raises: errors of freeing memory on a lost device.
        """
        self._num_failed += 1
        if not self._forward.can_compute(self._token_row):
            self._num_broken += 1
            if self._num_broken == _MAX_STEPS:
                self._failure = f"{NOTHING_COMPUTED}, in {_MAX_STEPS} consecutive steps"
            return False
        self._num_broken = 0
        if self._num_failed < _MAX_STEPS:
            return True
        self._num_failed = 0
        if not self._computes_requests(num_tokens):
            self._failure = f"{_NO_REQUESTS}, after {_MAX_STEPS} consecutive failed steps"
            return False
        return True

    def require(self) -> None:
        """Raise EngineStopped if the device has failed three steps in a row."""
        if self._failure is not None:
            raise EngineStopped(self._failure)

    def _computes_requests(self, num_tokens: int) -> bool:
        num_prompt = min(num_tokens, self._kv_cache.shape.max_len - 1, self._kv_cache.num_free_tokens - 1)
        if num_prompt < 1:
            return True  # no room for more than the single token
        rows = synthetic_rows(self._prepare, num_prompt, 1, lambda event: None)
        kv_row = self._kv_cache.allocate(num_prompt + 1, num_prompt + 1)
        try:
            with self._pinned_adapter() as is_pinned:
                return all([self._computes(row, kv_row) for row in (rows if is_pinned else without_adapter(rows))])
        except Exception:
            logger.exception("the device cannot compute the engine's own requests")
            return False
        finally:
            self._kv_cache.free(kv_row)

    def _computes(self, row: Row, kv_row: int) -> bool:
        """Compute the row's prompt and a decode token; return whether the logits are finite."""
        num_prompt = len(row.tokens)
        prompt = self._compute([(row, Segment(kv_row, 0, num_prompt, 0))])
        row.tokens.append(row.tokens[0])
        decoded = self._compute([(row, Segment(kv_row, 0, 1, num_prompt))])
        return None not in (*prompt.tokens, *decoded.tokens)

    @contextmanager
    def _pinned_adapter(self) -> Iterator[bool]:
        """Keep the synthetic adapter in the bank for the block. Yield False if pinned adapters leave no room."""
        if not self._residency.try_pin([DIGEST], {DIGEST: synthetic_adapter(self._bank)}):
            yield False
            return
        try:
            self._residency.settle()
            yield True
        finally:
            self._residency.unpin([DIGEST])
            self._residency.settle()
            self._residency.evict(DIGEST)
