"""Fetch adapter weights into host memory and cache them within a byte budget."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.errors import AdapterLoadFailed, AdapterLost, AdapterUnfit
from lora_store.adapter import AdapterWeights

logger = logging.getLogger(__name__)

Fetch = Callable[[str], "Future[AdapterWeights]"]
"""Weights digest -> future of the weights. Must not block, because other fetches would wait."""
_DEFECTS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)  # a retry fails again


class AdapterLoader:
    """A cache of converted adapters. Requests for the same digest share one fetch; a failed fetch is not cached.

    `to_device_layout` runs on the executor, whose threads never wait for a fetch.
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
        self.num_ended = 0  # loads that have ended since the start
        self._loads: OrderedDict[str, Future[DeviceAdapter]] = OrderedDict()  # least recently used first
        self._bytes: dict[str, int] = {}  # digest -> size, for completed loads

    def __contains__(self, digest: object) -> bool:
        """Return whether the weights are cached or being loaded."""
        with self._lock:
            return digest in self._loads

    def load(self, digest: str) -> Future[DeviceAdapter]:
        """Return a future of the weights, which may fail with AdapterLoadFailed or AdapterUnfit."""
        with self._lock:
            if digest in self._loads:
                self._loads.move_to_end(digest)
                return self._loads[digest]
            future: Future[DeviceAdapter] = Future()
            future.set_running_or_notify_cancel()  # shared: a caller that leaves must not cancel it
            self._loads[digest] = future
        try:
            self._fetch(digest).add_done_callback(lambda fetched: self._submit_conversion(digest, fetched, future))
        except Exception as exc:
            self._fail(digest, future, exc)
        return future

    def find(self, digest: str) -> Future[DeviceAdapter] | None:
        """Return the ended load of cached weights, or None."""
        with self._lock:
            if digest not in self._bytes:
                return None
            self._loads.move_to_end(digest)
            return self._loads[digest]

    def discard(self, digest: str) -> None:
        """Drop cached weights. A load in progress continues."""
        with self._lock:
            if self._bytes.pop(digest, None) is not None:
                del self._loads[digest]

    @property
    def loading(self) -> frozenset[str]:
        """Return the digests of the loads in progress."""
        with self._lock:
            return frozenset(self._loads.keys() - self._bytes.keys())

    @property
    def cached_bytes(self) -> int:
        with self._lock:
            return sum(self._bytes.values())

    def _submit_conversion(self, digest: str, fetched: Future[AdapterWeights], future: Future[DeviceAdapter]) -> None:
        """Hand the conversion to the executor. Runs on the fetching thread, which must not be blocked."""
        try:
            self._executor.submit(self._finish, digest, fetched, future)
        except RuntimeError as exc:  # the executor has shut down
            self._fail(digest, future, exc)

    def _finish(self, digest: str, fetched: Future[AdapterWeights], future: Future[DeviceAdapter]) -> None:
        try:
            weights = fetched.result()
            if weights.weights_digest != digest:
                raise AdapterLoadFailed(
                    f"requested the weights {digest[:12]} but received {weights.weights_digest[:12]}"
                )
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
        """Count a load that has ended. Call it after the future is set."""
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
    logger.warning("cannot load the weights %s", digest, exc_info=exc)
    error = AdapterLoadFailed(f"cannot load the weights {digest[:12]}; retry later")
    if isinstance(exc, _DEFECTS):
        error = AdapterLost(f"cannot load the weights {digest[:12]}; the worker's log has the cause")
    error.__cause__ = exc
    return error
