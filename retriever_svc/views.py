"""Read a long prompt part by part.

The request is often a small part of what a client sends: a question before or behind retrieved text, or the last lines
of what an agent writes. The encoder reads the beginning of a text, in which the request hardly counts. So a long prompt
of several paragraphs has *views*: its first and its last paragraph, each alone and with the next one. The view that is
nearest to its best adapter decides. Where none fits, the whole text decides. If it competed too, prompts behind or
before other text would keep 7 points fewer of their right answers on the tune pools (`benchmarks.routing.wording`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from retriever_svc.encoder import MAX_CHARS, tokens_read
from retriever_svc.errors import NoAdapterMatched, StaleIndex
from retriever_svc.route import Route, RouteRequest

LONG_CHARS = 400  # a shorter prompt is read as a whole
_LEAST_CHARS = 12  # a shorter part says nothing
_BLANK_LINES = re.compile(r"\n\s*\n")


def read_ends(text: str) -> str:
    """Return what is read of a prompt: of one above `MAX_CHARS` its first and its last half of them."""
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS // 2] + text[-(MAX_CHARS // 2) :]


def split_views(text: str) -> list[str]:
    """Return the whole text, followed by its other views, if it has any.

    Line ends of Windows, and blank lines that are several or have spaces, make no difference.
    """
    text = text.replace("\r\n", "\n")
    parts = [part.strip() for part in _BLANK_LINES.split(text) if part.strip()] if len(text) >= LONG_CHARS else []
    if len(parts) < 2:
        return [text]
    whole, views = "\n\n".join(parts), [parts[-1], "\n\n".join(parts[-2:]), parts[0], "\n\n".join(parts[:2])]
    return [text, *dict.fromkeys(view for view in views if len(view) >= _LEAST_CHARS and view != whole)]


def tokens_routed(text: str) -> int:
    """Estimate how many tokens the encoder reads to route `text`: those of each of its views."""
    return sum(map(tokens_read, split_views(read_ends(text))))


def with_views(requests: Sequence[RouteRequest]) -> tuple[list[RouteRequest], list[range]]:
    """Return a request for each view of each request, and the places of those of each request."""
    views: list[RouteRequest] = []
    places: list[range] = []
    for request in requests:
        own = [replace(request, text=text) for text in split_views(request.text)]
        places.append(range(len(views), len(views) + len(own)))
        views += own
    return views, places


def choose_views(
    answers: Sequence[Route | NoAdapterMatched | StaleIndex], places: Sequence[Sequence[int]]
) -> list[int]:
    """Return which answer decides for each prompt. `places`: of the answers to its views, the whole text's first."""
    return [own[_choose_view([answers[place] for place in own])] for own in places]


def _choose_view(answers: Sequence[Route | NoAdapterMatched | StaleIndex]) -> int:
    fitting = {
        place: max(item.score - item.threshold for item in answer.candidates if item.outcome >= 0)
        for place, answer in enumerate(answers)
        if place > 0 and isinstance(answer, Route) and not answer.abstained
    }
    return max(fitting, key=fitting.__getitem__, default=0)
