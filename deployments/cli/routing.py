"""`loraretriever route --file`: measure routing with a file of prompts."""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
from rich.progress import track
from rich.table import Table

from deployments.cli.client import check, find_param, find_wait, open_client, pages
from deployments.cli.output import counted, err, fail, out, print_json, show_error
from deployments.json_types import JsonObject

_RANKS = (1, 3, 5, 8)
_BATCH = 32
_INVALID, _LIMITED = 400, 429
_MAX_WAITS = 30  # for one request; others may use all of the key's limit
_AUROC = "AUROC of the confidence"
_POINTS = (0.01, 0.03, 0.08, 0.15, 0.25)
_BAR_CHARS = 20
_SHOWN_LINES = 10


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with its correct adapters; none if the base model should answer it. `line`: of the file, from 1.

    `adapters` is None where the file does not say.
    """

    prompt: str
    adapters: frozenset[str] | None
    line: int


def measure_routing(file: Path, url: str, *, as_json: bool) -> None:
    """Measure how often `auto` finds a correct adapter, and how often it abstains where none is correct.

    Rows whose adapter is null should be answered by the base model.
    """
    rows = read_labelled(file)
    require_known(file, rows, {row["id"] for page in pages(url, "/v1/loras") for row in page["data"]})
    with open_client(url) as client:
        tracked = track(
            _plans(client, rows), "routing", len(rows), console=err, transient=True, disable=not err.is_terminal
        )
        routed = [Routed.of(*item) for item in tracked]
    inside = [item for item in routed if item.is_inside]
    outside = [item for item in routed if not item.is_inside]
    measures = _measures(inside, outside)
    if as_json:
        print_json({"num_inside": len(inside), "num_outside": len(outside), "measures": measures})
        return
    out.print(_make_table(measures, f"{counted(len(inside), 'prompt')} of adapters, {counted(len(outside), 'other')}"))
    if inside and outside:
        out.print(_operating_points(inside, outside))


def require_known(file: Path, rows: Sequence[Labelled], known: Collection[str]) -> None:
    """Print the lines that name an adapter that the pool does not list, and exit if there are any."""
    from deployments.field_problems import did_you_mean  # imports pydantic

    unknown = [(row.line, name) for row in rows for name in sorted(row.adapters or ()) if name not in known]
    for line, name in unknown[:_SHOWN_LINES]:
        show_error(f"{file}: line {line}: no adapter {name!r} in the pool{did_you_mean(name, known)}")
    if unknown:
        rest = len(unknown) - _SHOWN_LINES
        fail(f"and {rest} more" if rest > 0 else "correct the names; `loraretriever list` prints them")


@dataclass(frozen=True, slots=True)
class Routed:
    """The choice for one row, with the server's defaults. `confidence`: the largest of any candidate.

    `rank`: of the best correct candidate among more candidates, from 0.
    """

    is_inside: bool
    rank: float
    abstained: bool
    confidence: float

    @classmethod
    def of(cls, row: Labelled, plan: JsonObject, wide: JsonObject) -> Self:
        """Create it from the plan that a client gets, and from one with more candidates."""
        names = [candidate["name"] for candidate in wide["candidates"]]
        ranks = [rank for rank, name in enumerate(names) if name in (row.adapters or ())]
        confidence = max((candidate["confidence"] for candidate in plan["candidates"]), default=0.0)
        return cls(bool(row.adapters), min(ranks, default=math.inf), plan["abstained"], confidence)


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Return how often a value from `inside` is larger than one from `outside`; equal values count as half."""
    ordered = sorted(outside)
    above = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in inside)
    return above / (2 * len(inside) * len(outside))


def _measures(inside: Sequence[Routed], outside: Sequence[Routed]) -> dict[str, float]:
    measures: dict[str, float] = {}
    if inside:
        measures |= {f"hit@{rank}": _share(item.rank < rank for item in inside) for rank in _RANKS}
        measures["answered by adapters"] = _share(not item.abstained for item in inside)
    if outside:
        measures["others answered by the base model"] = _share(item.abstained for item in outside)
    if inside and outside:
        values = ([item.confidence for item in group] for group in (inside, outside))
        measures[_AUROC] = auroc(*values)
    return measures


def _make_table(measures: Mapping[str, float], title: str) -> Table:
    table = Table("measure", "value", title=title)
    for name, value in measures.items():
        table.add_row(name, f"{value:.3f}" if name == _AUROC else f"{value:.1%}")
    return table


def _operating_points(inside: Sequence[Routed], outside: Sequence[Routed]) -> Table:
    """Return what other operating points would do: a well calibrated pool turns away as much as the first column."""
    title = "calibration: █ prompts of adapters turned away, ░ others"
    table = Table("least confidence", "prompts of adapters turned away", "others turned away", "", title=title)
    for point in _POINTS:
        own, others = (_share(item.confidence < point for item in group) for group in (inside, outside))
        bars = f"{'█' * round(own * _BAR_CHARS)}\n{'░' * round(others * _BAR_CHARS)}"
        table.add_row(f"{point:.1%}", f"{own:.1%}", f"{others:.1%}", bars)
    return table


def _share(hits: Iterable[bool]) -> float:
    marks = list(hits)
    return sum(marks) / len(marks)


def read_labelled(file: Path, *, needs_adapter: bool = True) -> list[Labelled]:
    """Read the rows of the file. Print the first invalid line and exit if there is one.

    `needs_adapter`: a row without `adapter` is invalid.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON texts may have other separators
    except OSError as exc:
        fail(exc)
    except UnicodeDecodeError as exc:
        fail(f"{file}: {exc}")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    rows = [_labelled(line, file, number, needs_adapter=needs_adapter) for number, line in numbered]
    return rows or fail(f"{file}: contains no prompts")


def _labelled(line: str, file: Path, number: int, *, needs_adapter: bool) -> Labelled:
    place = f"{file}:{number}"
    try:
        raw = json.loads(line)
    except (RecursionError, ValueError) as exc:
        fail(f"{place}: invalid JSON: {exc}")
    prompt = (raw.get("input") or raw.get("prompt")) if isinstance(raw, dict) else None
    adapters = raw.get("adapter") if isinstance(raw, dict) else None
    is_given = isinstance(raw, dict) and "adapter" in raw
    names = [adapters] if isinstance(adapters, str) else adapters
    is_known = (is_given and adapters is None) or (isinstance(names, list) and names)
    if not isinstance(prompt, str) or not (is_known or not (is_given or needs_adapter)):
        fail(f'{place}: must be {{"input" or "prompt": text, "adapter": name, list of names, or null}}')
    if not is_given:
        return Labelled(prompt, None, number)
    return Labelled(prompt, frozenset() if names is None else frozenset(map(str, names)), number)


def _plans(client: httpx.Client, rows: Sequence[Labelled]) -> Iterator[tuple[Labelled, JsonObject, JsonObject]]:
    """Yield every row with its plan, and with one of more candidates.

    More candidates abstain less, since it is enough that one of them fits. So ranks have a request of their own.
    """
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        plans = [_routed(client, batch, options) for options in ({}, {"k": max(_RANKS)})]
        yield from zip(batch, *plans, strict=True)


def _routed(client: httpx.Client, rows: Sequence[Labelled], options: JsonObject) -> list[JsonObject]:
    """Return the plan of every row. Rows that are too many for the key are sent in halves."""
    response = _post(client, {"prompt": [row.prompt for row in rows], "lora": options})
    if len(rows) > 1 and response.status_code == _INVALID and find_param(response) == "prompt":
        middle = len(rows) // 2
        return [plan for half in (rows[:middle], rows[middle:]) for plan in _routed(client, half, options)]
    check(response)
    data: list[JsonObject] = response.json()["data"]
    return data


def _post(client: httpx.Client, body: JsonObject) -> httpx.Response:
    """Return the answer to the request, which is sent again after a limit of the key has passed."""
    for _ in range(_MAX_WAITS):
        response = client.post("/v1/route", json=body)
        if response.status_code != _LIMITED:
            return response
        time.sleep(max(1.0, find_wait(response)))
    return client.post("/v1/route", json=body)
