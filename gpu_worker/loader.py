"""Adapter weights in host memory: fetched once, kept within a byte budget."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future

from gpu_worker.errors import AdapterLoadFailed, AdapterUnfit
from lora_store.adapter import AdapterWeights

logger = logging.getLogger(__name__)

Fetch = Callable[[str], AdapterWeights]
"""Weights digest -> weights. Runs on a loading thread, may block, raises whatever went wrong."""


class AdapterLoader:
    """One fetch a digest at a time, however many requests wait for it; after a failed one the next request retries."""

    def __init__(
        self,
        fetch: Fetch,
        *,
        check: Callable[[AdapterWeights], None],
        executor: Executor,
        budget_bytes: int,
        on_done: Callable[[], None],
    ) -> None:
        self._fetch, self._check, self._executor = fetch, check, executor
        self._budget_bytes, self._on_done = budget_bytes, on_done
        self._lock = threading.Lock()
        self._loads: OrderedDict[str, Future[AdapterWeights]] = OrderedDict()  # least recently used first
        self._bytes: dict[str, int] = {}

    def load(self, digest: str) -> Future[AdapterWeights]:
        """The weights, now or later. The future fails with AdapterLoadFailed or AdapterUnfit."""
        with self._lock:
            if digest in self._loads:
                self._loads.move_to_end(digest)
                return self._loads[digest]
            future: Future[AdapterWeights] = Future()
            self._loads[digest] = future
        try:
            self._executor.submit(self._run, digest, future)
        except RuntimeError as exc:  # the executor has shut down
            self._forget(digest)
            future.set_exception(_load_error(digest, exc))
        return future

    @property
    def cached_bytes(self) -> int:
        with self._lock:
            return sum(self._bytes.values())

    def _run(self, digest: str, future: Future[AdapterWeights]) -> None:
        try:
            weights = self._fetch(digest)
            if weights.weights_digest != digest:
                raise AdapterLoadFailed(f"asked for the weights {digest[:12]}, got {weights.weights_digest[:12]}")
            self._check(weights)
        except Exception as exc:
            self._forget(digest)
            future.set_exception(_load_error(digest, exc))
        else:
            self._keep(digest, weights)
            future.set_result(weights)
        self._on_done()

    def _forget(self, digest: str) -> None:
        with self._lock:
            del self._loads[digest]

    def _keep(self, digest: str, weights: AdapterWeights) -> None:
        with self._lock:
            self._bytes[digest] = sum(m.lora_a.nbytes + m.lora_b.nbytes for m in weights.modules.values())
            for oldest in [loaded for loaded in self._loads if loaded in self._bytes and loaded != digest]:
                if sum(self._bytes.values()) <= self._budget_bytes:
                    break
                del self._bytes[oldest], self._loads[oldest]


def _load_error(digest: str, exc: Exception) -> Exception:
    if isinstance(exc, AdapterUnfit):
        return exc
    logger.warning("the weights %s could not be fetched", digest, exc_info=exc)
    error = AdapterLoadFailed(f"the weights {digest[:12]} could not be fetched; try again later")
    error.__cause__ = exc
    return error
