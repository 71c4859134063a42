"""The commands that show the pool and change it."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from deployments.cli.client import DEFAULT_URL, Url, call, client_of, err, follow, message_of, out

commands = typer.Typer()
Name = Annotated[str, typer.Argument(help="an adapter's name")]


@commands.command("list")
def list_adapters(url: Url = DEFAULT_URL) -> None:
    """List the pool."""
    rows: list[dict[str, Any]] = []
    answer: dict[str, Any] = {"has_more": True, "last_id": ""}
    while answer["has_more"]:
        answer = call(url, "GET", "/v1/loras", params={"after": answer["last_id"]})
        rows += answer["data"]
    table = Table("adapter", "digest", "ranks", "bytes", "samples", "auto", title=f"generation {answer['generation']}")
    for row in rows:
        ranks = ", ".join(map(str, row["ranks"]))
        auto = "yes" if row["found_by_auto"] else "by name only"
        table.add_row(row["id"], row["digest"][:12], ranks, str(row["num_bytes"]), str(row["num_samples"]), auto)
    out.print(table)


@commands.command()
def show(name: Name, url: Url = DEFAULT_URL) -> None:
    """Show one adapter and the versions of it that are kept."""
    answer = call(url, "GET", f"/v1/loras/{quote(name, safe='')}")
    versions = Table("digest", "state", "generation", "published", "by", "source")
    for row in answer.pop("versions"):
        cells = (row["digest"][:12], row["state"], row["generation"], row["created_at"], row["actor"], row["source"])
        versions.add_row(*map(str, cells))
    facts = Table(show_header=False)
    for key, value in answer.items():
        facts.add_row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    out.print(facts)
    out.print(versions)


@commands.command()
def withdraw(
    names: Annotated[list[str], typer.Argument(help="adapters to take out of the pool")], url: Url = DEFAULT_URL
) -> None:
    """Take adapters out of the pool, with all their versions."""
    failed = 0
    with client_of(url) as client:
        for name in names:
            response = client.delete(f"/v1/loras/{quote(name, safe='')}")
            if response.is_error:
                failed += 1
                err.print(f"{name}: {message_of(response)}", style="red", markup=False, soft_wrap=True)
            else:
                out.print(f"{name} is gone at generation {response.json()['generation']}", markup=False)
    if failed:
        raise typer.Exit(1)


@commands.command()
def rollback(
    name: Name,
    to: Annotated[str | None, typer.Option(help="beginning of a kept version's digest; else the one before")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Publish a kept version of an adapter again."""
    answer = call(url, "POST", f"/v1/loras/{quote(name, safe='')}/rollback", json={} if to is None else {"digest": to})
    out.print(f"{answer['name']} is {answer['digest'][:12]} again at generation {answer['generation']}", markup=False)


@commands.command()
def visibility(
    name: Name,
    wanted: Annotated[str, typer.Argument(help="public or private", metavar="VISIBILITY")],
    url: Url = DEFAULT_URL,
) -> None:
    """Say who may name an adapter and find it: all tenants, or its own alone."""
    answer = call(url, "PATCH", f"/v1/loras/{quote(name, safe='')}", json={"visibility": wanted})
    out.print(f"{answer['name']} is {answer['visibility']} at generation {answer['generation']}", markup=False)


@commands.command()
def approve(
    name: Name,
    digest: Annotated[str | None, typer.Option(help="the whole digest of the version you looked at")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Let `auto` choose a public adapter's live version for every tenant. Without --digest, show it and ask."""
    path = f"/v1/loras/{quote(name, safe='')}"
    if digest is None:
        digest = _confirmed(call(url, "GET", path))
    answer = call(url, "POST", f"{path}/approve", json={"digest": digest})
    out.print(
        f"{answer['name']} {answer['digest'][:12]} is approved at generation {answer['generation']}", markup=False
    )


def _confirmed(shown: dict[str, Any]) -> str:
    """Return the digest of the live version once the user has agreed to approve it; else end the command."""
    for field in ("id", "digest", "visibility", "num_samples", "tags", "created_at"):
        out.print(f"{field}: {shown[field]}", markup=False, highlight=False, soft_wrap=True)
    typer.confirm("Approve this version for every tenant?", abort=True)
    digest: str = shown["digest"]
    return digest


@commands.command()
def verify(url: Url = DEFAULT_URL) -> None:
    """Read every stored blob again and compare it with its digest."""
    result = follow(url, "/v1/pool/verify", {}, "verifying")
    for problem in result["problems"]:
        err.print(f"{problem['adapter']}: {problem['problem']}", style="red", markup=False, soft_wrap=True)
    out.print(f"{result['num_blobs']} blobs, {len(result['problems'])} bad")
    if result["problems"]:
        raise typer.Exit(1)


@commands.command()
def gc(
    retention: Annotated[float, typer.Option(help="seconds: what was written later is left alone")] = 86_400,
    url: Url = DEFAULT_URL,
) -> None:
    """Remove what nothing in the pool refers to any more."""
    answer = call(url, "POST", "/v1/pool/gc", json={"retention_s": retention})
    out.print(f"removed {answer['num_blobs']} blobs, {answer['num_bytes']} bytes")


@commands.command()
def reindex(
    encoder: Annotated[str, typer.Option(help="a sentence-transformers model: a folder, or a hub id")],
    url: Url = DEFAULT_URL,
) -> None:
    """Embed the pool with another encoder beside the old index, then search by it."""
    result = follow(url, "/v1/pool/reindex", {"encoder": encoder}, "embedding")
    behind = result["replicas"]["behind"]
    note = f" ({behind} replicas do not have it yet)" if behind else ""
    out.print(f"the pool is searched by {encoder} since generation {result['generation']}{note}", markup=False)
