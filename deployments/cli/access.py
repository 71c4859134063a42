"""`loraretriever access`: say who may use an adapter."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from deployments.cli.client import DEFAULT_URL, Commands, Json, Url, call, fail, out, print_json
from deployments.cli.pool import Name
from deployments.json_types import JsonObject

commands = typer.Typer(cls=Commands, help="Say who may use an adapter.")


@commands.command()
def public(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Let all tenants use an adapter."""
    _set_visibility(name, "public", url, as_json=as_json)


@commands.command()
def private(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Let only its own tenant use an adapter."""
    _set_visibility(name, "private", url, as_json=as_json)


def _set_visibility(name: str, wanted: str, url: str, *, as_json: bool) -> None:
    answer = call(url, "PATCH", f"/v1/loras/{quote(name, safe='')}", json={"visibility": wanted})
    if as_json:
        print_json(answer)
        return
    out.print(f"{answer['name']} is {answer['visibility']} at generation {answer['generation']}", markup=False)


@commands.command()
def approve(
    name: Name,
    digest: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="full digest of the version that you have reviewed")
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let `auto` choose the live version of a public adapter for every tenant. Without --digest, ask first."""
    path = f"/v1/loras/{quote(name, safe='')}"
    if digest is None:
        shown = call(url, "GET", path)
        if shown["visibility"] != "public":
            fail(f"{name!r} is private: make it public first with `loraretriever access public {name}`")
        call(url, "POST", f"{path}/approve", json={"digest": shown["digest"]}, params={"dry_run": "true"})
        digest = _confirmed(shown)
    answer = call(url, "POST", f"{path}/approve", json={"digest": digest})
    if as_json:
        print_json(answer)
        return
    out.print(
        f"{answer['name']} {answer['digest'][:12]} is approved at generation {answer['generation']}", markup=False
    )


def _confirmed(shown: JsonObject) -> str:
    """Show the live version and ask for confirmation. Return its digest, or exit."""
    for field in ("id", "digest", "visibility", "num_samples", "tags", "created_at"):
        out.print(f"{field}: {shown[field]}", markup=False, highlight=False, soft_wrap=True)
    typer.confirm("Approve this version for every tenant?", abort=True)
    digest: str = shown["digest"]
    return digest
