"""`loraretriever keys`: create, list and revoke API keys in a keys file, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deployments.cli.client import Commands, JsonOutcome, err, fail, name_options, out, print_json, problem_of

commands = typer.Typer(cls=Commands, help="Create, list and revoke the API keys of a keys file.")
Limit = Annotated[int | None, typer.Option(min=0, help="limit of the key; default: none")]
KeysFile = Annotated[Path, typer.Option("--file", "-f", help="the keys file")]


@commands.command()
def new(
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="tenant of the key")],
    role: Annotated[
        list[str], typer.Option("--role", "-r", help="infer, publish or admin; repeatable, or with commas between")
    ],
    id: Annotated[
        str | None, typer.Option(help="id of the key in logs and in the catalogue; default: generated")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="keys file to add the key to; default: print its entry")
    ] = None,
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


@commands.command("list")
def list_keys(file: KeysFile, as_json: JsonOutcome = False) -> None:
    """List the keys of a file by their ids. The keys themselves are not in it."""
    from deployments.auth.api_keys import parse_entries  # imports pydantic

    try:
        entries = parse_entries(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        fail(f"{file}: {problem_of(exc)}" if isinstance(exc, ValueError) else problem_of(exc))
    rows = [entry.model_dump(mode="json", exclude_none=True, exclude={"sha256"}) for entry in entries]
    if as_json:
        print_json({"data": rows})
        return
    table = Table("id", "tenant", "roles", "limits")
    for row in rows:
        limits = ", ".join(f"{name} {value}" for name, value in row.get("limits", {}).items())
        table.add_row(row["id"], row["tenant"], ", ".join(row["roles"]), limits)
    out.print(table)


@commands.command()
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="id of the key, as `keys list` prints it")],
    file: KeysFile,
    as_json: JsonOutcome = False,
) -> None:
    """Remove a key from the file. A running server refuses it from its next request on."""
    from deployments.auth.key_issuing import remove_entry  # imports pydantic

    try:
        remove_entry(file, id)
    except (OSError, ValueError) as exc:
        fail(f"{file}: {exc}" if isinstance(exc, ValueError) else problem_of(exc))
    if as_json:
        print_json({"id": id, "revoked": True})
        return
    out.print(f"{id} is revoked in {file}", markup=False, highlight=False, soft_wrap=True)
