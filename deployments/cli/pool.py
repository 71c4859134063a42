"""The commands that show and change the pool."""

from __future__ import annotations

from functools import partial
from typing import Annotated
from urllib.parse import quote

import typer
from rich.table import Column, Table

from deployments.cli.client import (
    DEFAULT_URL,
    Json,
    Url,
    behind_note,
    call,
    client_of,
    counted,
    fail,
    follow,
    message_of,
    out,
    pages,
    print_json,
    show_error,
    show_warning,
)
from deployments.cli.publish import share_of
from deployments.json_types import JsonObject

commands = typer.Typer()
Name = Annotated[str, typer.Argument(help="name of the adapter")]


@commands.command("list")
def list_adapters(
    search: Annotated[str, typer.Option(help="show adapters that match all of these words")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="show adapters with this tag; repeatable")] = None,
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
    names, digests, autos = (
        Column("adapter", overflow="fold"),
        Column("digest", no_wrap=True),
        Column("auto", no_wrap=True),
    )
    tags = Column("tags", overflow="fold")
    table = Table(names, digests, "ranks", "bytes", "samples", autos, tags, title=f"generation {answer['generation']}")
    for row in rows:
        ranks, auto = ", ".join(map(str, row["ranks"])), "yes" if row["found_by_auto"] else "by name only"
        cells = (row["digest"][:12], ranks, str(row["num_bytes"]), str(row["num_samples"]), auto)
        table.add_row(row["id"], *cells, ", ".join(row["tags"]))
    out.print(table)
    for row in rows:
        if row.get("trial"):
            out.print(f"{row['id']}: {share_of(row['trial'])}", markup=False, highlight=False)
    for row in answer.get("unserved", []):  # a server of an earlier version has none
        show_error(row["text"])


@commands.command()
def show(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Show an adapter and its versions."""
    answer = call(url, "GET", f"/v1/loras/{quote(name, safe='')}")
    if as_json:
        print_json(answer)
        return
    answer.pop("samples", None)  # none was asked for
    if answer.get("trial"):
        answer["trial"] = share_of(answer["trial"])
    for field, shown in (("created_at", "published"), ("live_since", "live since")):
        if field in answer:
            answer[shown] = _time_of(answer.pop(field))
    versions = Table("digest", "state", "generation", "published", "by", Column("source", overflow="fold"))
    for row in answer.pop("versions"):
        published = _time_of(row["created_at"])
        cells = (row["digest"][:12], row["state"], row["generation"], published, row["actor"], row["source"])
        versions.add_row(*map(str, cells))
    facts = Table(Column(), Column(overflow="fold"), show_header=False)
    for key, value in answer.items():
        if value is None:
            continue
        facts.add_row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    out.print(facts)
    out.print(versions)


def _time_of(text: str) -> str:
    """Return the time to the second."""
    return text[:19].replace("T", " ")


@commands.command()
def withdraw(
    names: Annotated[list[str], typer.Argument(help="adapters to remove from the pool")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Remove adapters with all their versions from the pool."""
    rows: list[JsonObject] = []
    with client_of(url) as client:
        for name in names:
            response = client.delete(f"/v1/loras/{quote(name, safe='')}")
            is_gone = not response.is_error
            rows.append(
                {"name": name, **(response.json() if is_gone else {"error": {"message": message_of(response)}})}
            )
            if as_json:
                continue
            if is_gone:
                out.print(f"{name} was withdrawn at generation {rows[-1]['generation']}", markup=False)
            else:
                show_error(f"{name}: {message_of(response)}")
    if as_json:
        print_json({"data": rows})
    if any("error" in row for row in rows):
        raise typer.Exit(1)


@commands.command()
def rollback(
    name: Name,
    to: Annotated[
        str | None, typer.Option(help="digest of a kept version, or its beginning; default: the previous version")
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Make an earlier version of an adapter live again. If a trial runs, end it: the live version answers alone."""
    answer = call(url, "POST", f"/v1/loras/{quote(name, safe='')}/rollback", json={} if to is None else {"digest": to})
    if as_json:
        print_json(answer)
        return
    out.print(
        f"{answer['name']} is back at {answer['digest'][:12]} since generation {answer['generation']}", markup=False
    )


@commands.command()
def share(
    name: Name,
    percent: Annotated[float, typer.Argument(min=0, max=100, help="percent of the requests; 0 ends the trial")],
    version: Annotated[
        str | None, typer.Option(help="digest of a kept version, or its beginning; default: the one under trial")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="answer copies of these requests, which no client sees")
    ] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let another kept version answer a share of the requests to an adapter's name."""
    body: JsonObject = {"share": percent / 100, "shadow": shadow, **({} if version is None else {"digest": version})}
    answer = call(url, "POST", f"/v1/loras/{quote(name, safe='')}/share", json=body)
    if as_json:
        print_json(answer)
        return
    trial = answer["trial"]
    done = "the live version answers every request" if trial is None else share_of(trial)
    out.print(f"{answer['name']}: {done} since generation {answer['generation']}", markup=False, highlight=False)


@commands.command()
def promote(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Make the version under trial the live one."""
    path = f"/v1/loras/{quote(name, safe='')}"
    trial = call(url, "GET", path)["trial"]
    if trial is None:
        fail(f"no version of {name!r} is under trial: start one with `loraretriever share`")
    answer = call(url, "POST", f"{path}/rollback", json={"digest": trial["digest"]})
    if as_json:
        print_json(answer)
        return
    out.print(
        f"{answer['name']} is live as {answer['digest'][:12]} since generation {answer['generation']}", markup=False
    )


@commands.command()
def visibility(
    name: Name,
    wanted: Annotated[str, typer.Argument(help="public or private", metavar="VISIBILITY")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Set whether all tenants may use an adapter, or only its own."""
    answer = call(url, "PATCH", f"/v1/loras/{quote(name, safe='')}", json={"visibility": wanted})
    if as_json:
        print_json(answer)
        return
    out.print(f"{answer['name']} is {answer['visibility']} at generation {answer['generation']}", markup=False)


@commands.command()
def approve(
    name: Name,
    digest: Annotated[str | None, typer.Option(help="full digest of the version that you have reviewed")] = None,
    confirmed: Annotated[
        bool,
        typer.Option("--confirmed", help="with --digest: also if it draws many prompts that others' adapters are for"),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what it would draw, approve nothing")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let `auto` choose the live version of a public adapter for every tenant. Without --digest, ask first."""
    path = f"/v1/loras/{quote(name, safe='')}"
    body: JsonObject = {"digest": digest, **({"confirmed": True} if confirmed else {})}
    if digest is None or dry_run:
        shown = call(url, "GET", path)
        if shown["visibility"] != "public":
            fail(f"{name!r} is private: make it public first with `loraretriever visibility {name} public`")
        body["digest"] = digest or shown["digest"]
        checked = call(url, "POST", f"{path}/approve", json=body, params={"dry_run": "true"})
        if dry_run and as_json:
            print_json(checked)
            return
        _show_approval(shown, checked)
        if dry_run:
            return
        typer.confirm("Approve this version for every tenant?", abort=True)
        if checked["draws"]["needs_confirmation"]:
            body["confirmed"] = True
    answer = call(url, "POST", f"{path}/approve", json=body)
    if as_json:
        print_json(answer)
        return
    out.print(
        f"{answer['name']} {answer['digest'][:12]} is approved at generation {answer['generation']}", markup=False
    )


def _show_approval(shown: JsonObject, checked: JsonObject) -> None:
    """Print the version to approve, and what it would draw."""
    for field in ("id", "digest", "visibility", "num_samples", "tags", "created_at"):
        out.print(f"{field}: {shown[field]}", markup=False, highlight=False, soft_wrap=True)
    draws = checked["draws"]
    show = show_warning if draws["needs_confirmation"] else partial(out.print, markup=False, highlight=False)
    show(draws["text"])


@commands.command()
def verify(as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Compare every stored blob with its digest."""
    result = follow(url, "/v1/pool/verify", {}, "verifying")
    if as_json:
        print_json(result)
    else:
        for problem in result["problems"]:
            show_error(f"{problem['adapter']}: {problem['problem']}")
        out.print(f"{counted(result['num_blobs'], 'blob')}, {len(result['problems'])} bad")
    if result["problems"]:
        raise typer.Exit(1)


@commands.command()
def gc(
    retention: Annotated[float, typer.Option(help="seconds; blobs written more recently are kept")] = 86_400,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete stored blobs that no version refers to, and projections that no embedding is of."""
    answer = call(url, "POST", "/v1/pool/gc", json={"retention_s": retention})
    if as_json:
        print_json(answer)
        return
    blobs, projections = counted(answer["num_blobs"], "blob"), counted(answer["num_projections"], "projection")
    out.print(f"removed {blobs} and {projections}, {counted(answer['num_bytes'], 'byte')}")


@commands.command()
def reindex(
    encoder: Annotated[str, typer.Option(help="sentence-transformers model: a folder or a hub id")],
    projection: Annotated[
        str, typer.Option(help="auto: the packaged one, if any; none; refit: fit one to the pool's samples")
    ] = "auto",
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Embed the pool with another encoder, then switch to it. The old index serves until then."""
    result = follow(url, "/v1/pool/reindex", {"encoder": encoder, "projection": projection}, "embedding")
    if as_json:
        print_json(result)
        return
    behind = result["replicas"]["behind"]
    note = f" ({behind_note(behind)})" if behind else ""
    out.print(f"the pool uses {encoder} since generation {result['generation']}{note}", markup=False)
