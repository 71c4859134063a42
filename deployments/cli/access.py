"""`loraretriever access`: say who may use an adapter."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from deployments.cli.client import call, lora_path
from deployments.cli.options import DEFAULT_URL, Commands, Json, Url
from deployments.cli.output import err, fail, out, print_json, report, show_warning
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
    answer = call(url, "PATCH", lora_path(name), json={"visibility": wanted})
    done = f"{answer['name']} is {answer['visibility']} at generation {answer['generation']}"
    report(answer, done, as_json=as_json)


@commands.command()
def approve(
    name: Name,
    digest: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="full digest of the version that you have reviewed")
    ] = None,
    confirmed: Annotated[
        bool,
        typer.Option(
            "--confirmed",
            help="with --digest: approve even if it would draw many prompts that other owners' adapters are for",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what it would draw, approve nothing")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let `auto` choose the live version of a public adapter for every tenant. Without --digest, ask first."""
    path = lora_path(name)
    body: JsonObject = {"digest": digest, **({"confirmed": True} if confirmed else {})}
    if digest is None or dry_run:
        shown = call(url, "GET", path)
        if shown["visibility"] != "public":
            fail(f"{name!r} is private: make it public first with `loraretriever access public {name}`")
        body["digest"] = digest or shown["digest"]
        checked = call(url, "POST", f"{path}/approve", json=body, params={"dry_run": "true"})
        if dry_run and as_json:
            print_json(checked)
            return
        _show_approval(shown, checked, err if as_json else out)
        if dry_run:
            return
        typer.confirm("Approve this version for every tenant?", abort=True, err=as_json)
        if checked["draws"]["needs_confirmation"]:
            body["confirmed"] = True
    answer = call(url, "POST", f"{path}/approve", json=body)
    done = f"{answer['name']} {answer['digest'][:12]} is approved at generation {answer['generation']}"
    report(answer, done, as_json=as_json)


def _show_approval(shown: JsonObject, checked: JsonObject, console: Console) -> None:
    """Print the version to approve, and what it would draw."""
    for field in ("id", "digest", "visibility", "num_samples", "tags", "created_at"):
        console.print(f"{field}: {shown[field]}", markup=False, highlight=False, soft_wrap=True)
    if contract := shown.get("contract"):
        console.print(f"contract: {json.dumps(contract)}", markup=False, highlight=False, soft_wrap=True)
    draws = checked["draws"]
    show = show_warning if draws["needs_confirmation"] else partial(console.print, markup=False, highlight=False)
    show(draws["text"])
