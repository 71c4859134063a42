"""The calls of a Serve handle, on an object of this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class LocalHandle:
    """Stands where a DeploymentHandle is asked and no replica runs: `handle.method.remote(...)` calls the method."""

    def __init__(self, target: object) -> None:
        self._target = target

    def options(self, **_: object) -> LocalHandle:
        """Itself: options say which way a call takes."""
        return self

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(getattr(self._target, name))


@dataclass(frozen=True, slots=True)
class LocalMethod:
    method: Callable[..., Any]

    def remote(self, *args: Any) -> Any:
        return self.method(*args)
