"""The commands that measure routing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.progress import track
from rich.table import Table

from deployments.cli.client import DEFAULT_URL, Url, check, client_of, err, fail, follow, out
from deployments.json_types import JsonObject

commands = typer.Typer()
_RANKS = (1, 3, 5, 8)
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with its correct adapters."""

    prompt: str
    adapters: frozenset[str]


@commands.command("eval-routing")
def eval_routing(
    file: Annotated[
        Path, typer.Argument(help='JSON lines {"input" or "prompt": text, "adapter": name or list of names}')
    ],
    url: Url = DEFAULT_URL,
) -> None:
    """Measure how often a correct adapter is among the best 1, 3, 5 and 8 candidates, and how often `auto` abstains."""
    rows = read_labelled(file)
    hits, num_abstained = dict.fromkeys(_RANKS, 0), 0
    with client_of(url) as client:
        for row, plan in track(_plans(client, rows), "routing", len(rows), console=err, transient=True):
            names = [candidate["name"] for candidate in plan["candidates"]]
            for rank in _RANKS:
                hits[rank] += not row.adapters.isdisjoint(names[:rank])
            num_abstained += plan["abstained"]
    table = Table("measure", "share", title=f"{len(rows)} prompts")
    for rank in _RANKS:
        table.add_row(f"hit@{rank}", f"{hits[rank] / len(rows):.1%}")
    table.add_row("abstained", f"{num_abstained / len(rows):.1%}")
    out.print(table)


def read_labelled(file: Path) -> list[Labelled]:
    """Read the rows of the file. Print the first invalid line and exit if there is one."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        fail(f"{file}: no such file")
    except (OSError, UnicodeDecodeError) as exc:
        fail(f"{file}: {exc}")
    rows = [_labelled(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    return rows or fail(f"{file}: contains no prompts")


def _labelled(line: str, place: str) -> Labelled:
    try:
        raw = json.loads(line)
    except ValueError as exc:
        fail(f"{place}: invalid JSON: {exc}")
    prompt = (raw.get("input") or raw.get("prompt")) if isinstance(raw, dict) else None
    adapters = raw.get("adapter") if isinstance(raw, dict) else None
    names = [adapters] if isinstance(adapters, str) else adapters
    if not isinstance(prompt, str) or not isinstance(names, list) or not names:
        fail(f'{place}: must be {{"input" or "prompt": text, "adapter": name or list of names}}')
    return Labelled(prompt, frozenset(map(str, names)))


def _plans(client: httpx.Client, rows: Sequence[Labelled]) -> Iterator[tuple[Labelled, JsonObject]]:
    """Yield every row with the plan of the server."""
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        body = {"prompt": [row.prompt for row in batch], "lora": {"k": max(_RANKS), "explain": True}}
        response = client.post("/v1/route", json=body)
        check(response)
        yield from zip(batch, response.json()["data"], strict=True)


@commands.command()
def doctor(url: Url = DEFAULT_URL) -> None:
    """Route the samples of every adapter, and report adapters that are hard to find or collide."""
    report = follow(url, "/v1/pool/doctor", {}, "routing")
    k = report["k"]
    shares = f"own adapter first {report['first_share']:.1%}, among the best {k} {report['found_share']:.1%}"
    out.print(f"{report['num_adapters']} adapters, {report['num_samples']} samples: {shares}")
    for row in report["collisions"]:
        first, second = row["adapters"]
        swapped = " and ".join(map(str, row["num_swapped"]))
        out.print(
            f"collision: {first} and {second}, cosine {row['cosine']:.3f}, {swapped} samples swapped", markup=False
        )
    for row in report["always_shadowed"]:
        out.print(f"never first: {row['name']}, behind {row['by']}", markup=False)
    for title, key in (("never chosen", "never_chosen"), ("unreadable samples", "unreadable")):
        for name in report[key]:
            out.print(f"{title}: {name}", markup=False)
