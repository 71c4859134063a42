"""A deployment whose replicas die."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError


@dataclass
class Dying:
    """The first `num_deaths` calls, of any methods, kill their replica. The others are answered."""

    num_deaths: int = 0
    received: list[tuple[Any, ...]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[str]]:
        async def method(*args: Any) -> str:
            self.received.append((name, *args))
            if len(self.received) <= self.num_deaths:
                raise RayActorError()
            return f"answer to {name}"

        return method
