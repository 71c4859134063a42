"""`loraretriever usage`: who used what."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from deployments.cli.client import call
from deployments.cli.options import DEFAULT_URL, Json, Url
from deployments.cli.output import out, print_json
from deployments.json_types import JsonObject

commands = typer.Typer()
_NUMBERS = {
    "requests": "requests",
    "errors": "errors",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "new",
}
_NO_ADAPTER = "(none)"


@commands.command()
def usage(
    by: Annotated[
        list[str] | None,
        typer.Option("--by", "-b", help="day, tenant, key, adapter, version or base; repeatable"),
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="first day, as 2026-11-01; default: 30 days")] = None,
    end: Annotated[str | None, typer.Option("--to", help="last day; default: today")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="only this tenant")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show how many requests and tokens were used, and how long it took, by day, tenant, key, adapter, version or base.

    A key with the role admin sees all tenants, any other key its own. Days are of UTC. A request that several adapters
    answered counts for each of them.
    """
    groups = list(by or [])
    given = {"start": start, "end": end, "tenant": tenant}
    params: dict[str, str | list[str]] = {
        "by": groups,
        **{name: value for name, value in given.items() if value is not None},
    }
    report = call(url, "GET", "/v1/usage", params=params)
    if as_json:
        print_json(report)
        return
    columns = [Column(name, overflow="fold") for name in groups]
    columns += [Column(title, justify="right", no_wrap=True) for title in (*_NUMBERS.values(), "mean s")]
    table = Table(*columns, title=f"{report['start']} to {report['end']}; prompt, cached and new are tokens")
    for row in report["data"]:
        mean = "–" if row["mean_s"] is None else f"{row['mean_s']:.2f}"
        table.add_row(*(_shown(name, row) for name in groups), *(f"{row[name]:,}" for name in _NUMBERS), mean)
    out.print(table)


def _shown(group: str, row: JsonObject) -> str:
    value: str | None = row[group]
    return _NO_ADAPTER if value is None else value[:12] if group == "version" else value
