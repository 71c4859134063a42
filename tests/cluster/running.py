"""The application on several nodes, and the requests that tests send to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.load import Ask, Load
from tests.cluster.machines import Machines

TOPICS = ("whales", "glaciers", "violins", "beetles", "volcanoes", "bread")
MAX_TOKENS = 400
TENANTS = tuple(f"team-{number}" for number in range(20))  # each has a key of its name


@dataclass(frozen=True)
class Running:
    """The nodes, and the answer to each request without failures."""

    machines: Machines
    model: Path
    pool: Path
    expected: Mapping[tuple[str, str], str]

    def load(self, *, max_retries: int = 0) -> Load:
        return Load(self.machines.url, self.expected, max_retries)


def asks(count: int, *, num_streamed: int = 0) -> list[Ask]:
    """Return requests for the base model, named adapters and `auto`, in turn; streamed ones are spread evenly."""
    names = ["tiny", *TOPICS]
    kinds = [(name, f"The sea, the {name} and") for name in names]
    kinds += [("auto", f"Tell me about {topic}, please.") for topic in TOPICS]
    total = count + num_streamed
    streamed = {number * total // num_streamed for number in range(num_streamed)}
    return [Ask(*kinds[number % len(kinds)], MAX_TOKENS, number in streamed) for number in range(total)]
