"""Cache the token ids of recent prompts, so that the `n` rows of one request tokenize its prompt once."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from gpu_worker.errors import GpuWorkerError
from gpu_worker.front.request.request import Job
from lora_store.lru_cache import LruCache

MAX_PROMPTS = 64

_Outcome = Sequence[int] | GpuWorkerError | None
"""The token ids of a prompt, or its error; None if tokenizing failed for another reason."""


class PromptMemo:
    """A thread-safe cache of token ids, or errors, by tenant, template and prompt.

    The tenant is part of the key, because a fast answer would reveal another tenant's prompts. Concurrent rows wait for
    the first one to tokenize. Keys are digests, and errors are stored without traceback and cause, so no prompt text
    stays in memory.
    """

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._known: LruCache[bytes, Future[_Outcome]] = LruCache(max_prompts)
        self._lock = threading.Lock()

    def tokens(self, job: Job, tokenize: Callable[[Job], Sequence[int]]) -> Sequence[int]:
        """Return the result of `tokenize` for the job's prompt, from the cache if possible.

        Raises: what `tokenize` raises. A GpuWorkerError is cached too.
        """
        return _outcome(self.begin(job, tokenize).result(), job, tokenize)

    def begin(self, job: Job, tokenize: Callable[[Job], Sequence[int]]) -> Future[_Outcome]:
        """Tokenize the job's prompt unless another row has begun to. Return the future of the outcome.

        Raises: what `tokenize` raises.
        """
        key = _make_key(job)
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                return found
            made: Future[_Outcome] = Future()
            self._known.put(key, made)
        self._make(key, made, job, tokenize)
        return made

    def _make(self, key: bytes, made: Future[_Outcome], job: Job, tokenize: Callable[[Job], Sequence[int]]) -> None:
        """Tokenize the prompt and pass the outcome to the waiting rows. Raises: what `tokenize` raises."""
        try:
            tokens = tokenize(job)
        except GpuWorkerError as exc:
            made.set_result(copy.copy(exc))  # a copy, because raising adds frames to `exc`
            raise
        except BaseException:
            self._forget(key)
            made.set_result(None)
            raise
        made.set_result(tokens)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._known.pop(key)


def _outcome(known: _Outcome, job: Job, tokenize: Callable[[Job], Sequence[int]]) -> Sequence[int]:
    """Return the cached ids. Raises: a new copy of the cached error, because raising adds frames to it."""
    if known is None:
        return tokenize(job)
    if isinstance(known, GpuWorkerError):
        raise copy.copy(known)
    return known


def _make_key(job: Job) -> bytes:
    parts = [job.tenant, job.template]
    if isinstance(job.prompt, tuple):
        parts += [repr(job.tools), *map(repr, job.prompt)]
    else:
        parts.append(job.prompt if isinstance(job.prompt, str) else repr(job.prompt.ids))
    digest = hashlib.sha256(type(job.prompt).__name__.encode())
    for part in parts:
        data = part.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()
