"""Read the keys file again when it changes: edited, replaced, or swapped as Kubernetes swaps a mounted secret."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from deployments.auth.api_keys import KeySet, parse_entries, single_entry
from deployments.auth.authenticator import Caller, FindCaller
from deployments.errors import KeysUnavailable

logger = logging.getLogger(__name__)

MISSING_GRACE_S = 300.0  # how long keys stay valid while their file is missing
_SETTLE_S = 2.0  # a file this young may change again with the same time and size
_State = tuple[int, int, int, int, int]


def load_keys(api_key: SecretStr | None, keys_file: Path | None) -> FindCaller | None:
    """Return the look-up in the keys that are set, or None for a server without keys. Raises: ValueError, OSError."""
    if api_key is not None:
        return KeySet([single_entry(api_key.get_secret_value())]).find
    if keys_file is None:
        return None
    return KeyFile(keys_file, missing_grace_s=MISSING_GRACE_S).find


class KeyFile:
    """The keys in `path`. Each lookup calls `stat` and reads the file again if it has changed.

    If the file is invalid, the previous keys stay valid and the error is logged once. If it is missing or unreadable,
    they stay valid for `missing_grace_s`; after that no key is valid until the file is back. Replace the file by a
    rename, so that no reader sees half of it.
    """

    def __init__(
        self,
        path: Path,
        *,
        missing_grace_s: float = math.inf,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file. Raises: ValueError, OSError: the file cannot be used, so the server must not start."""
        self._path, self._now, self._monotonic = path, now, monotonic
        self._missing_grace_s = missing_grace_s
        self._missing_since: float | None = None
        self._last_error = ""
        self._state: _State | None = self._state_now()
        self._content = path.read_bytes()
        self._key_set = self._parse(self._content)

    def find(self, key: str) -> Caller | None:
        """Return the caller that owns `key`, or None.

        Raises: KeysUnavailable: the file is missing for too long; KeyRefused: the key has expired.
        """
        self._refresh()
        if self._missing_since is not None and self._monotonic() - self._missing_since >= self._missing_grace_s:
            raise KeysUnavailable("the server's keys file is missing or unreadable; retry later")
        return self._key_set.find(key)

    def _refresh(self) -> None:
        try:
            state = self._state_now()  # before the content: a change between the two is seen next time
            is_young = 0 <= self._now() - state[3] / 1e9 < _SETTLE_S
            if state == self._state and not is_young:
                return
            content = self._path.read_bytes()
            self._missing_since = None
            if (state, content) == (self._state, self._content):
                return
            self._state, self._content = state, content
            self._key_set = self._parse(content)
        except (OSError, ValueError) as exc:
            self._fail(exc)
            return
        self._last_error = ""
        logger.info("reloaded %s: %d keys", self._path, len(self._key_set))

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError):
            self._state = None  # read the file when it is back, even if it is unchanged
            self._missing_since = self._monotonic() if self._missing_since is None else self._missing_since
        if str(error) != self._last_error:
            logger.error("cannot reload the keys, keeping the previous ones: %s%s", error, self._until(error))
        self._last_error = str(error)

    def _until(self, error: Exception) -> str:
        if not isinstance(error, OSError) or math.isinf(self._missing_grace_s):
            return ""
        return f"; they expire {self._missing_grace_s:.0f} s after the file went missing"

    def _state_now(self) -> _State:
        found = os.stat(self._path)  # follows links: a secret's `..data` leads to another folder after a swap
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _parse(self, content: bytes) -> KeySet:
        try:
            return KeySet(parse_entries(content.decode("utf-8")), now=self._now)
        except ValueError as exc:
            raise ValueError(f"{self._path} cannot be used: {exc}") from exc
