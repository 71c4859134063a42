"""Adapter weights in host memory: fetched once, kept within a byte budget."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.errors import AdapterLoadFailed, AdapterUnfit
from lora_store.adapter import AdapterWeights

logger = logging.getLogger(__name__)

Fetch = Callable[[str], "Future[AdapterWeights]"]
"""Weights digest -> its weights, now or later, or whatever went wrong. Must not block: others would wait with it."""


class AdapterLoader:
    """One fetch a digest at a time, however many requests wait for it; after a failed one the next request retries.

    `to_device_layout` runs on the executor: its threads work, they never wait for a fetch.
    """

    def __init__(
        self,
        fetch: Fetch,
        *,
        to_device_layout: Callable[[AdapterWeights], DeviceAdapter],
        executor: Executor,
        budget_bytes: int,
        on_done: Callable[[], None],
    ) -> None:
        self._fetch, self._to_device_layout, self._executor = fetch, to_device_layout, executor
        self._budget_bytes, self._on_done = budget_bytes, on_done
        self._lock = threading.Lock()
        self.num_ended = 0  # loads, since the start
        self._loads: OrderedDict[str, Future[DeviceAdapter]] = OrderedDict()  # least recently used first
        self._bytes: dict[str, int] = {}  # of those that are loaded

    def __contains__(self, digest: object) -> bool:
        """Whether the weights are in host memory, or on their way there."""
        with self._lock:
            return digest in self._loads

    def load(self, digest: str) -> Future[DeviceAdapter]:
        """The weights, now or later. The future fails with AdapterLoadFailed or AdapterUnfit."""
        with self._lock:
            if digest in self._loads:
                self._loads.move_to_end(digest)
                return self._loads[digest]
            future: Future[DeviceAdapter] = Future()
            future.set_running_or_notify_cancel()  # many share it: nobody who leaves may cancel it
            self._loads[digest] = future
        try:
            self._fetch(digest).add_done_callback(lambda fetched: self._submit_conversion(digest, fetched, future))
        except Exception as exc:
            self._fail(digest, future, exc)
        return future

    def discard(self, digest: str) -> None:
        """Loaded weights are kept no longer; a load in progress goes on."""
        with self._lock:
            if self._bytes.pop(digest, None) is not None:
                del self._loads[digest]

    @property
    def loading(self) -> frozenset[str]:
        """Digests of the loads in progress."""
        with self._lock:
            return frozenset(self._loads.keys() - self._bytes.keys())

    @property
    def cached_bytes(self) -> int:
        with self._lock:
            return sum(self._bytes.values())

    def _submit_conversion(self, digest: str, fetched: Future[AdapterWeights], future: Future[DeviceAdapter]) -> None:
        """Called on the thread that fetches, which has other fetches to attend to."""
        try:
            self._executor.submit(self._finish, digest, fetched, future)
        except RuntimeError as exc:  # the executor has shut down
            self._fail(digest, future, exc)

    def _finish(self, digest: str, fetched: Future[AdapterWeights], future: Future[DeviceAdapter]) -> None:
        try:
            weights = fetched.result()
            if weights.weights_digest != digest:
                raise AdapterLoadFailed(f"asked for the weights {digest[:12]}, got {weights.weights_digest[:12]}")
            adapter = self._to_device_layout(weights)
        except Exception as exc:
            self._fail(digest, future, exc)
            return
        self._keep(digest, adapter)
        future.set_result(adapter)
        self._end()

    def _fail(self, digest: str, future: Future[DeviceAdapter], exc: Exception) -> None:
        with self._lock:
            del self._loads[digest]
        future.set_exception(_load_error(digest, exc))
        self._end()

    def _end(self) -> None:
        """Count a load that has ended, once its future has."""
        with self._lock:
            self.num_ended += 1
        self._on_done()

    def _keep(self, digest: str, adapter: DeviceAdapter) -> None:
        with self._lock:
            self._bytes[digest] = adapter.num_bytes
            for oldest in [loaded for loaded in self._loads if loaded in self._bytes and loaded != digest]:
                if sum(self._bytes.values()) <= self._budget_bytes:
                    break
                del self._bytes[oldest], self._loads[oldest]


def _load_error(digest: str, exc: Exception) -> Exception:
    if isinstance(exc, AdapterUnfit | AdapterLoadFailed):
        return exc
    logger.warning("the weights %s could not be fetched", digest, exc_info=exc)
    error = AdapterLoadFailed(f"the weights {digest[:12]} could not be fetched; try again later")
    error.__cause__ = exc
    return error
