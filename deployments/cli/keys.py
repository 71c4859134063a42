"""`loraretriever keys`: keys for a server's keys file. Works on the file, not over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployments.cli.client import err, fail, out

commands = typer.Typer(no_args_is_help=True, help="Make keys for a server's keys file.")
Limit = Annotated[int | None, typer.Option(min=0)]


@commands.command()
def new(
    tenant: Annotated[str, typer.Option(help="whose key it is")],
    role: Annotated[list[str], typer.Option(help="infer, publish or admin; may be repeated")],
    id: Annotated[str | None, typer.Option(help="how logs and the catalogue call it; else made up")] = None,
    file: Annotated[Path | None, typer.Option(help="the keys file it is added to; else its entry is printed")] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    max_adapters: Limit = None,
    max_bytes: Limit = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept. A running server takes the file's change at once."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
        "max_adapters": max_adapters,
        "max_bytes": max_bytes,
    }
    from deployments.auth.key_issuing import add_entry, block_of, make_key  # pydantic and the rest: as in `serve`

    try:
        key, entry = make_key(tenant, role, limits, id)
        if file is not None:
            add_entry(file, entry)
    except (OSError, ValueError) as exc:
        fail(str(exc) if file is None else f"{file}: {exc}")
    if file is None:
        err.print("the entry for the keys file, then the key, which is not shown again:", style="dim")
        out.print(block_of(entry), end="", markup=False, highlight=False, soft_wrap=True)
    else:
        err.print(f"{entry['id']} is in {file}; the key, which is not shown again:", style="dim", markup=False)
    out.print(key, markup=False, highlight=False, soft_wrap=True)
