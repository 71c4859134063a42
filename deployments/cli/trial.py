"""`loraretriever trial`: try a version on a share of the requests to an adapter's name."""

from __future__ import annotations

from typing import Annotated

import typer

from deployments.cli.client import call, lora_path
from deployments.cli.options import DEFAULT_URL, Commands, Json, Url
from deployments.cli.output import fail, report
from deployments.cli.pool import Name
from deployments.cli.publish_report import describe_share
from deployments.json_types import JsonObject

commands = typer.Typer(cls=Commands, help="Try a version on a share of the requests to an adapter's name.")


@commands.command()
def start(
    name: Name,
    percent: Annotated[float, typer.Argument(metavar="PERCENT", help="share of the requests, above 0 and at most 100")],
    version: Annotated[
        str | None,
        typer.Option(
            "--version", "-v", metavar="DIGEST", help="a kept version, or its beginning; default: the one under trial"
        ),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="answer copies of these requests, which no client sees")
    ] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let another kept version answer a share of the requests to an adapter's name, or change that share."""
    if not 0 < percent <= 100:
        raise typer.BadParameter(
            f"must be above 0 and at most 100, got {percent:g}; `loraretriever trial stop {name}` ends a trial",
            param_hint="PERCENT",
        )
    body: JsonObject = {"share": percent / 100, "shadow": shadow, **({} if version is None else {"digest": version})}
    answer = call(url, "POST", f"{lora_path(name)}/share", json=body)
    done = f"{describe_share(answer['trial'])} since generation {answer['generation']}"
    report(answer, f"{answer['name']}: {done}", as_json=as_json)


@commands.command()
def stop(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """End the trial: the live version answers every request. The version under trial is kept."""
    answer = call(url, "POST", f"{lora_path(name)}/share", json={"share": 0})
    done = f"the live version answers every request since generation {answer['generation']}"
    report(answer, f"{answer['name']}: {done}", as_json=as_json)


@commands.command()
def promote(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Make the version under trial the live one."""
    path = lora_path(name)
    trial = call(url, "GET", path)["trial"]
    if trial is None:
        fail(f"no version of {name!r} is under trial: start one with `loraretriever trial start {name} PERCENT`")
    answer = call(url, "POST", f"{path}/rollback", json={"digest": trial["digest"]})
    done = f"{answer['name']} is live as {answer['digest'][:12]} since generation {answer['generation']}"
    report(answer, done, as_json=as_json)
