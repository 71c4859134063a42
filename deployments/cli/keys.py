"""`loraretriever keys`: create API keys in a keys file, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.client import Commands, JsonOutcome, err, fail, name_options, out, print_json

commands = typer.Typer(cls=Commands, no_args_is_help=True, help="Create API keys for a server's keys file.")
Limit = Annotated[int | None, typer.Option(min=0)]


@commands.command()
def new(
    tenant: Annotated[str, typer.Option(help="tenant of the key")],
    role: Annotated[list[str], typer.Option(help="infer, publish or admin; repeatable, or with commas between")],
    id: Annotated[
        str | None, typer.Option(help="id of the key in logs and in the catalogue; default: generated")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="keys file to add the key to; default: print its entry")] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    max_adapters: Limit = None,
    max_bytes: Limit = None,
    as_json: JsonOutcome = False,
) -> None:
    """Create a key and print it once; the file keeps only its hash. A running server reloads the file."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
        "max_adapters": max_adapters,
        "max_bytes": max_bytes,
    }
    from deployments.auth.key_issuing import add_entry, block_of, make_key  # imports pydantic

    try:
        key, entry = make_key(tenant, [part for given in role for part in given.split(",")], limits, id)
        if file is not None:
            add_entry(file, entry)
    except (OSError, ValueError) as exc:
        message = name_options(str(exc))
        fail(message if file is None or message.startswith("--") else f"{file}: {message}")
    if as_json:
        print_json({"key": key, "entry": entry})
        return
    if file is None:
        err.print("entry for the keys file, then the key, which is not shown again:", style="dim")
        out.print(block_of(entry), end="", markup=False, highlight=False, soft_wrap=True)
    else:
        err.print(f"added {entry['id']} to {file}; the key, which is not shown again:", style="dim", markup=False)
    out.print(key, markup=False, highlight=False, soft_wrap=True)
