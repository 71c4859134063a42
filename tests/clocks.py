"""A clock that tests set by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """Returns `at`, in seconds."""

    at: float = 100.0

    def __call__(self) -> float:
        return self.at
