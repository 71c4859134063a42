"""`loraretriever name`: let model names stand for policies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.table import Column, Table
from rich.text import Text

from deployments.cli.client import call, pages
from deployments.cli.options import DEFAULT_URL, Commands, Json, Url
from deployments.cli.output import err, fail, out, print_json, report
from deployments.cli.pool import Earlier
from deployments.json_types import JsonObject

commands = typer.Typer(cls=Commands, help="Let model names stand for policies: which adapters answer, and how.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="model name")]


@commands.command("set")
def set_name(
    name: Name,
    policy: Annotated[
        Path, typer.Argument(metavar="FILE", help="policy in YAML or JSON: fields of a request; - reads standard input")
    ],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let a model name stand for a policy, from the next request on."""
    import yaml  # takes a tenth of a second

    from deployments.yaml_files import load_yaml, require_json

    try:
        text = sys.stdin.read() if str(policy) == "-" else policy.read_text(encoding="utf-8")
        body = require_json(load_yaml(text))
    except (OSError, ValueError, yaml.YAMLError) as exc:
        fail(f"{policy}: {exc}")
    if not isinstance(body, dict):
        fail(f"{policy}: must hold the fields of a policy, such as `temperature: 0`")
    _report(call(url, "PUT", _path(name), json=body), as_json=as_json)


@commands.command("list")
def list_names(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="show the versions of this name")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List the model names with their policies, or the versions of one name."""
    if name is None:
        answer = {"object": "list", "data": [row for page in pages(url, "/v1/names") for row in page["data"]]}
    else:
        answer = call(url, "GET", _path(name))
    if as_json:
        print_json(answer)
        return
    fixed = [Column(title, no_wrap=True) for title in ("digest", "since", "approved")]
    table = Table(Column("name", overflow="fold"), *fixed, "by", Column("policy", overflow="fold"))
    for row in answer["data"] if name is None else answer["versions"]:
        policy = Text(json.dumps(row["policy"], indent=1))  # not markup, which [INST] would be
        cells = (row["digest"][:12], row["created_at"][:19].replace("T", " "), "yes" if row["approved"] else "no")
        table.add_row(row.get("id", name), *cells, row["actor"], policy)
    out.print(table)


@commands.command()
def rollback(name: Name, to: Earlier = None, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Make an earlier policy of a model name the newest again."""
    body = {} if to is None else {"digest": to}
    _report(call(url, "POST", f"{_path(name)}/rollback", json=body), as_json=as_json)


@commands.command()
def approve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="model name, as OWNER/NAME")],
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="full digest of the version")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let every tenant use a version of a model name. Asks for confirmation first, except with --json."""
    if not as_json:
        shown = call(url, "POST", f"{_path(name)}/approve", json={"digest": digest}, params={"dry_run": "true"})
        err.print(json.dumps(shown["policy"], indent=2), markup=False, highlight=False)
        typer.confirm("Approve this policy for every tenant?", abort=True, err=True)
    _report(call(url, "POST", f"{_path(name)}/approve", json={"digest": digest}), as_json=as_json)


@commands.command()
def remove(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Remove a model name with its versions."""
    _report(call(url, "DELETE", _path(name)), as_json=as_json)


def _path(name: str) -> str:
    return f"/v1/names/{quote(name, safe='/')}"


def _report(answer: JsonObject, *, as_json: bool) -> None:
    version = f" {answer['digest'][:12]}" if "digest" in answer else ""
    done = "approved" if answer.get("approved") else "in use" if version else "removed"
    report(answer, f"{answer['name']}{version} is {done} at generation {answer['generation']}", as_json=as_json)
