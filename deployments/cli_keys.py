"""`loraretriever keys`: keys for a server's keys file. Works on the file, not over HTTP."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from deployments.cli_http import err, fail, out
from deployments.key_ring import KeyEntry, hash_of, new_key, parse_entries

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
    key = new_key()
    entry: dict[str, Any] = {
        "id": id or f"{tenant}-{secrets.token_hex(4)}",
        "sha256": hash_of(key),
        "tenant": tenant,
        "roles": role,
    }
    if given := {name: value for name, value in limits.items() if value is not None}:
        entry["limits"] = given
    try:
        KeyEntry.model_validate(entry)
    except ValidationError as exc:
        first = exc.errors()[0]
        fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    if file is None:
        err.print("the entry for the keys file, then the key, which is not shown again:", style="dim")
        out.print(_block(entry), end="", markup=False, highlight=False, soft_wrap=True)
    else:
        _add(file, entry)
        err.print(f"{entry['id']} is in {file}; the key, which is not shown again:", style="dim", markup=False)
    out.print(key, markup=False, highlight=False, soft_wrap=True)


def _add(file: Path, entry: dict[str, Any]) -> None:
    """Put the entry behind those of the file, which stays as it was otherwise and is never there by half."""
    try:
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        text = with_entry(old, entry)
        target = file.resolve()  # a link stays a link
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as made:
            made.write(text)
        os.chmod(made.name, target.stat().st_mode & 0o777 if target.exists() else 0o600)
        os.replace(made.name, target)
    except (OSError, ValueError) as exc:
        fail(f"{file}: {exc}")


def with_entry(text: str, entry: dict[str, Any]) -> str:
    """The keys file `text` with one more entry; comments stay where it is a YAML list. Raises: ValueError."""
    if not text.strip():
        return _block(entry)
    old = parse_entries(text)
    for more in (text.rstrip("\n") + "\n" + _block(entry), json.dumps([*json_list(text), entry], indent=1) + "\n"):
        try:
            if len(parse_entries(more)) == len(old) + 1:
                return more
        except ValueError as exc:
            problem = exc
    raise problem


def json_list(text: str) -> list[Any]:
    """The raw entries of a keys file that was found good."""
    entries: list[Any] = yaml.safe_load(text)
    return entries


def _block(entry: dict[str, Any]) -> str:
    """The entry as an item of a YAML list."""
    return str(yaml.safe_dump([entry], sort_keys=False))
