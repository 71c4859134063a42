"""The commands that list, show and withdraw adapters."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from deployments.cli.client import call, find_message, lora_path, open_client, pages
from deployments.cli.options import DEFAULT_URL, Json, Url
from deployments.cli.output import join_lines, out, print_json, report, say, show_error
from deployments.cli.publish_report import describe_share
from deployments.json_types import JsonObject

_SHOWN_SAMPLES = 3
_ONLY_JSON = ("weights_digest", "probe_shift", "catalogue_generation")  # nothing that a person looks for

commands = typer.Typer()
Name = Annotated[str, typer.Argument(metavar="NAME", help="name of the adapter")]
Earlier = Annotated[
    str | None,
    typer.Option("--to", metavar="DIGEST", help="a kept version, or its beginning; default: the previous version"),
]


@commands.command("list")
def list_adapters(
    search: Annotated[str, typer.Option("--search", "-s", help="show adapters that match all of these words")] = "",
    tag: Annotated[
        list[str] | None, typer.Option("--tag", "-t", help="show adapters with this tag; repeatable")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="show adapters of this tenant only")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List the adapters of the pool."""
    rows: list[JsonObject] = []
    answer: JsonObject = {}
    given = {"search": search or None, "owner": owner, "tag": tag}
    wanted = {name: value for name, value in given.items() if value}
    for answer in pages(url, "/v1/loras", wanted):
        rows += answer["data"]
    if as_json:
        print_json({"generation": answer["generation"], "unserved": answer.get("unserved", []), "data": rows})
        return
    names, tags = Column("adapter", overflow="fold"), Column("tags", overflow="fold")
    digests, autos = Column("digest", no_wrap=True), Column("auto", no_wrap=True)
    table = Table(names, digests, "ranks", "size", "samples", autos, tags, title=f"generation {answer['generation']}")
    for row in rows:
        ranks, auto = ", ".join(map(str, row["ranks"])), "yes" if row["found_by_auto"] else "by name only"
        if row["num_samples"] and not row["found_by_auto"]:
            auto = "after a reindex"
        is_foreign = "tenant" in answer and row["tenant"] != answer["tenant"]
        if is_foreign and row["found_by_auto"] and not row["approved"]:
            auto = "not approved"
        cells = (row["digest"][:12], ranks, show_bytes(row["num_bytes"]), str(row["num_samples"]), auto)
        table.add_row(row["id"], *cells, ", ".join(row["tags"]))
    out.print(table)
    for row in rows:
        if row.get("trial"):
            say(f"{row['id']}: {describe_share(row['trial'])}")
    for row in answer.get("unserved", []):  # a server of an earlier version has none
        show_error(row["text"])


@commands.command()
def show(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Show an adapter, its versions, and some of its samples if it is yours."""
    answer = call(url, "GET", lora_path(name), params={"samples": str(_SHOWN_SAMPLES), "varied": "true"})
    if as_json:
        print_json(answer)
        return
    samples = answer.pop("samples", [])
    if answer.get("trial"):
        answer["trial"] = describe_share(answer["trial"])
    if answer.get("contract"):
        answer["contract"] = json.dumps(answer["contract"], indent=2, ensure_ascii=False)
    for field, shown in (("created_at", "published"), ("live_since", "live since")):
        if field in answer:
            answer[shown] = _format_time(answer.pop(field))
    versions = Table("digest", "state", "generation", "published", "by", Column("source", overflow="fold"))
    for row in answer.pop("versions"):
        published = _format_time(row["created_at"])
        cells = (row["digest"][:12], row["state"], row["generation"], published, row["actor"], _escape(row["source"]))
        versions.add_row(*map(str, cells))
    facts = Table(Column(), Column(overflow="fold"), show_header=False)
    if "num_bytes" in answer:
        answer["size"] = show_bytes(answer.pop("num_bytes"))
    for key, value in answer.items():
        if value in (None, []) or key in _ONLY_JSON or (key == "id" and value == answer.get("name")):
            continue
        facts.add_row(key, _escape(", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    out.print(facts)
    out.print(versions)
    for sample in samples:
        say(join_lines(f"sample: {sample['input']}"))


def show_bytes(number: int) -> str:
    """Return a size with its unit, such as 1.4 MiB."""
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.1f} {units[0]}"


def _escape(text: str) -> str:
    """Return somebody else's text as a cell, without markup and terminal control characters."""
    return escape("".join(char if char.isprintable() or char == "\n" else " " for char in text))


def _format_time(text: str) -> str:
    """Return the time to the second."""
    return text[:19].replace("T", " ")


@commands.command()
def withdraw(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="adapters to remove from the pool")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Remove adapters and all their versions from the pool. This cannot be undone.

    In a terminal, the command asks before it removes more than one.
    """
    if len(names) > 1 and not yes and sys.stdin.isatty():
        typer.confirm(f"Withdraw {len(names)} adapters with all their versions?", abort=True)
    rows: list[JsonObject] = []
    with open_client(url, waits=True) as client:
        for name in names:
            response = client.delete(lora_path(name))
            answer = {"error": {"message": find_message(response)}} if response.is_error else response.json()
            rows.append({"name": name, **answer})
            if as_json:
                continue
            if response.is_error:
                show_error(f"{name}: {find_message(response)}")
            else:
                say(f"{name} was withdrawn at generation {answer['generation']}")
    if as_json:
        print_json({"data": rows})
    if any("error" in row for row in rows):
        raise typer.Exit(1)


@commands.command()
def rollback(name: Name, to: Earlier = None, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Make an earlier version of an adapter live again. If a trial runs, end it: the live version answers alone."""
    answer = call(url, "POST", f"{lora_path(name)}/rollback", json={} if to is None else {"digest": to})
    done = f"{answer['name']} is back at {answer['digest'][:12]} since generation {answer['generation']}"
    report(answer, done, as_json=as_json)
