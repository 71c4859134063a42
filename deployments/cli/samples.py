"""The commands for prompts of clients that may become samples."""

from __future__ import annotations

from typing import Annotated

import typer

from deployments.cli.client import call, lora_path
from deployments.cli.options import DEFAULT_URL, Commands, Json, Url
from deployments.cli.output import counted, join_lines, print_json, say
from deployments.json_types import JsonObject

commands = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Show, accept and reject prompts that requests to an adapter proposed as its samples.",
)
Name = Annotated[str, typer.Argument(help="name of the adapter")]
Ids = Annotated[list[str] | None, typer.Argument(help="ids that `samples list` shows; default: all")]


@commands.command("list")
def list_proposed(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """List the prompts that wait for a decision, newest first."""
    answer = call(url, "GET", lora_path(name), params={"proposed": "true"})
    if as_json:
        print_json({"data": answer["proposed"]})
        return
    for row in answer["proposed"]:
        say(f"{row['id']}  {row['key_id']}: {join_lines(row['input'])}")
    if not answer["proposed"]:
        say(f"no prompt is proposed for {name}")


@commands.command()
def accept(name: Name, ids: Ids = None, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Publish the adapter with these prompts among its samples. Its weights stay."""
    _change(url, name, {"action": "accept", "ids": ids}, as_json=as_json)


@commands.command()
def reject(name: Name, ids: Ids = None, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Drop these prompts. They are not proposed again."""
    _change(url, name, {"action": "reject", "ids": ids}, as_json=as_json)


@commands.command()
def undo(name: Name, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Take every accepted prompt out of the adapter's samples again."""
    _change(url, name, {"action": "undo"}, as_json=as_json)


def _change(url: str, name: str, body: JsonObject, *, as_json: bool) -> None:
    given = {field: value for field, value in body.items() if value}
    answer = call(url, "POST", f"{lora_path(name)}/samples", json=given)
    if as_json:
        print_json(answer)
    elif "num_rejected" in answer:
        say(f"{counted(answer['num_rejected'], 'prompt')} rejected")
    else:
        say(f"{answer['name']} is live as {answer['digest'][:12]} since generation {answer['generation']}")
        for text in answer["left_out"]:
            say(f"left out, as blank, a near-copy, or beyond the number that is kept: {join_lines(text)}")
