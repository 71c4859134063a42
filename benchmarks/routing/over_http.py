"""Ask a running server with `model: auto`: `python -m benchmarks.routing.over_http`. About two minutes.

Starts the server with the starter pool and its default settings, and posts chats of one new token. The answer says
which adapters gave it. Prompts of the pool's tasks should be answered by their own adapter, all others by the base
model. `--prompts` adds a file of yours, in the form that `loraretriever route --file` reads.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.paper.retrieval.projected import read_everyday, read_fresh
from benchmarks.results_file import write_results
from benchmarks.routing.conversations import read_cases
from benchmarks.starter_pool import HELD_OUT, POOL, read_prompts
from deployments.cli.local_server import Server
from deployments.cli.routing import read_labelled
from deployments.config.app import AppConfig

PER_TASK = 12
AT_ONCE = 16
out = Console(width=110)


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat with its kind. `expected`: the adapters that may answer it, none for the base model."""

    kind: str
    messages: tuple[dict[str, str], ...]
    expected: frozenset[str]

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Answered:
    """The server's answer to one chat. `best`: the adapter with the largest weight, None for the base model."""

    chat: Chat
    best: str | None
    why: str

    @property
    def is_right(self) -> bool:
        return self.best in self.chat.expected if self.chat.expected else self.best is None


def chats(files: Sequence[Path] = ()) -> Iterator[Chat]:
    """Yield the chats: of the starter pool's tasks, of no task, of other tasks, and those of `files`."""
    for prompt in read_prompts(HELD_OUT, PER_TASK):
        yield _chat("own, held out", prompt.input, {prompt.task})
    for case in read_cases("unseen_prompts"):
        kind = {"in-pool": "own, written later", "foreign": "other tasks"}.get(case.kind, "everyday, written later")
        yield Chat(kind, case.messages, frozenset([case.expected] if case.expected else []))
    for name, texts in (("everyday", read_everyday()), ("everyday, fresh", read_fresh())):
        yield from (_chat(name, text) for text in texts)
    for file in files:
        for row in read_labelled(file):
            whose = "own" if row.adapters else "others"
            yield _chat(f"{file.name}, {whose}", row.prompt, row.adapters)


def _chat(kind: str, text: str, expected: frozenset[str] | set[str] = frozenset()) -> Chat:
    return Chat(kind, ({"role": "user", "content": text},), frozenset(expected))


def ask(client: httpx.Client, chat: Chat) -> Answered:
    """Post one chat. Raises: RuntimeError if it is refused, or if the answer's header and body disagree."""
    body = {"model": "auto", "messages": chat.messages, "max_tokens": 1, "temperature": 0}
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code} for {chat.text[:80]!r}: {response.text}")
    rows = response.json()["lora"]["adapters"]
    in_header = response.headers["x-lora-adapters"]
    if [row["name"] for row in rows] != [item.partition("@")[0] for item in filter(None, in_header.split(", "))]:
        raise RuntimeError(f"the answer names {rows}, its header {in_header!r}")
    best = max(rows, key=lambda row: row["weight"])["name"] if rows else None
    return Answered(chat, best, response.headers["x-lora-why"])


def ask_all(url: str, every: Sequence[Chat]) -> list[Answered]:
    """Post all chats, some at once, and return what was answered, in order."""
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda chat: ask(client, chat), every))


def shares(answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """Return a row for each kind: how many prompts, the share that adapters answered, and the share answered rightly.

    `right_of_kept`: of those that adapters answered, the share whose own adapter is the best; None for
    prompts of no adapter.
    """
    rows = []
    for kind in dict.fromkeys(item.chat.kind for item in answered):
        own = [item for item in answered if item.chat.kind == kind]
        kept = [item for item in own if item.best is not None]
        is_own = any(item.chat.expected for item in own)
        rows.append(
            {
                "kind": kind,
                "prompts": len(own),
                "to_adapters": len(kept) / len(own),
                "right": sum(item.is_right for item in own) / len(own),
                "right_of_kept": sum(item.is_right for item in kept) / len(kept) if is_own and kept else None,
            }
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for people."""
    table = Table("kind", "prompts", "to adapters", "answered rightly", "own adapter, of those to adapters")
    for row in rows:
        values = (row["to_adapters"], row["right"], row["right_of_kept"])
        table.add_row(row["kind"], str(row["prompts"]), *("–" if value is None else f"{value:.3f}" for value in values))
    return table


def figures_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the share that was answered rightly, by kind."""
    return {f"http_{row['kind'].replace(', ', '_').replace(' ', '_')}_right": row["right"] for row in rows}


def served(every: Sequence[Chat]) -> list[Answered]:
    """Start a server with the starter pool and its defaults, and return what it answered."""
    with tempfile.TemporaryDirectory() as folder, Server(config_of(folder), port=0) as server:
        server.prepare(out.print)
        url = server.start()
        server.wait_ready(timeout_s=600)
        return ask_all(url, every)


def config_of(folder: str) -> AppConfig:
    """Return the default settings, with the starter pool."""
    return AppConfig(store_uri=f"{folder}/pool", preload=(POOL,))


def main(
    prompts: Annotated[list[Path] | None, typer.Option(help="a file of your own prompts; write no results")] = None,
    url: Annotated[str, typer.Option(help="a running server with the starter pool; write no results")] = "",
) -> None:
    """Ask all prompts, print the table and the prompts that were not answered rightly, and write the results."""
    every, began = list(chats(prompts or ())), time.monotonic()
    answered = ask_all(url, every) if url else served(every)
    rows = shares(answered)
    wrong = [
        {"kind": item.chat.kind, "answered_by": item.best, "why": item.why, "text": item.chat.text[:80]}
        for item in answered
        if not item.is_right
    ]
    with out.capture() as captured:
        out.print(table_of(rows))
    out.print(table_of(rows))
    for row in wrong:
        out.print(json.dumps(row, ensure_ascii=False), markup=False, highlight=False, soft_wrap=True)
    out.print(f"{len(every)} prompts, {time.monotonic() - began:.0f} s with the start of the server")
    if not (prompts or url):
        write_results("routing_over_http", figures=figures_of(rows), table=captured.get(), runs=[*rows, *wrong])


if __name__ == "__main__":
    typer.run(main)
