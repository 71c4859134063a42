"""Route real prompts, and count which adapters answer them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lora_store.adapter import AdapterRef
from retriever_svc.route import Route


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """A prompt of a client. `adapters`: those that should answer it, () for the base model, None: unknown."""

    text: str
    adapters: tuple[str, ...] | None = None


@dataclass(slots=True)
class AskedCounts:
    """How many prompts an adapter should answer, and how many it does; else another adapter or the base model does."""

    num: int = 0
    num_right: int = 0
    num_base: int = 0
    others: Counter[AdapterRef] = field(default_factory=Counter)

    @property
    def num_other(self) -> int:
        """The number of prompts that a wrong adapter answers."""
        return self.others.total()


@dataclass(frozen=True, slots=True)
class AskedReport:
    """The answers to real prompts.

    `labelled`: by the first adapter that should answer; None: the base model should. For the base model all right
    answers count in `num_right`. `unlabelled`: how many of the other prompts each adapter, or None, answers.
    """

    labelled: Mapping[AdapterRef | None, AskedCounts]
    unlabelled: Counter[AdapterRef | None]


def count_answers(answers: Iterable[tuple[tuple[AdapterRef, ...] | None, Route]]) -> AskedReport:
    """Count answers, given as (the adapters that should answer, as in `AskedPrompt`; the route)."""
    labelled: dict[AdapterRef | None, AskedCounts] = {}
    unlabelled: Counter[AdapterRef | None] = Counter()
    for wanted, route in answers:
        answering = route.plan.adapters[0].ref if route.plan.adapters else None
        if wanted is None:
            unlabelled[answering] += 1
            continue
        counts = labelled.setdefault(wanted[0] if wanted else None, AskedCounts())
        counts.num += 1
        if answering in (wanted or (None,)):
            counts.num_right += 1
        elif answering is None:
            counts.num_base += 1
        else:
            counts.others[answering] += 1
    return AskedReport(labelled, unlabelled)
