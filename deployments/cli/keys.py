"""`loraretriever keys`: create, list, rotate, expire and revoke API keys in a keys file, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deployments.cli.client import call
from deployments.cli.options import DEFAULT_URL, Commands, JsonOutcome, Url, name_options
from deployments.cli.output import describe_problem, err, fail, out, print_json, report, say
from deployments.json_types import JsonObject

_FIRST_DAY = "2000-01-01"
commands = typer.Typer(cls=Commands, help="Create, list, rotate, expire and revoke the API keys of a keys file.")
KeyId = Annotated[str, typer.Argument(metavar="ID", help="id of the key, as `keys list` prints it")]
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
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="requests a minute; default: no limit")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="tokens of prompts and answers a minute; default: no limit")
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="rows at once: prompts times n; default: no limit")
    ] = None,
    max_adapters: Annotated[
        int | None, typer.Option(min=0, help="adapters that its tenant may hold; default: no limit")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=0, help="bytes of weights that its tenant may hold, with older versions; default: no limit"),
    ] = None,
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="when it stops working: 30d, 12h, 2027-01-31, or never")
    ] = "never",
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
    from deployments.auth.key_issuing import add_entry, format_item, make_key, read_expiry  # imports pydantic

    with _file_errors(file):
        roles = [part for given in role for part in given.split(",")]
        key, entry = make_key(tenant, roles, limits, id, read_expiry(expires, datetime.now(UTC)))
        if file is not None:
            add_entry(file, entry)
    if file is None and not as_json:
        err.print("entry for the keys file, then the key, which is not shown again:", style="dim")
        out.print(format_item(entry), end="", markup=False, highlight=False, soft_wrap=True)
    _show_key(key, entry, f"added {entry['id']} to {file}" if file else "", as_json=as_json)


@commands.command("list")
def list_keys(
    file: KeysFile,
    used: Annotated[bool, typer.Option("--used", help="ask the server when each was last used")] = False,
    as_json: JsonOutcome = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List the keys of a file by their ids. The keys themselves are not in it.

    --used needs a key with the role admin, unless all keys of the file belong to its tenant, and a server that records
    usage. It knows the uses of the last `usage_days` days only. Requests that only read the pool do not count as use.
    """
    from deployments.auth.api_keys import parse_entries  # imports pydantic

    with _file_errors(file):
        entries = parse_entries(file.read_text(encoding="utf-8"))
    rows = [entry.model_dump(mode="json", exclude_none=True, exclude={"sha256"}) for entry in entries]
    more: JsonObject = {}
    if used:
        report = _read_usage(url, {row["tenant"] for row in rows})
        last = {row["key"]: row["last_at"] for row in report["data"]}
        rows = [row | {"last_used_at": last.get(row["id"])} for row in rows]
        more = {"usage_days": report["usage_days"]}
    if as_json:
        print_json({"data": rows} | more)
        return
    table = Table("id", "tenant", "roles", "limits", "expires", *(["last used"] if used else []))
    for row in rows:
        limits = ", ".join(f"{name} {value}" for name, value in row.get("limits", {}).items())
        times = [
            row.get("expires_at", "never"),
            *([row["last_used_at"] or f"not in {more['usage_days']} days"] if used else []),
        ]
        table.add_row(row["id"], row["tenant"], ", ".join(row["roles"]), limits, *times)
    out.print(table)


@commands.command()
def rotate(
    id: KeyId,
    file: KeysFile,
    overlap: Annotated[
        str, typer.Option(metavar="TIME", help="how long the old key works: 24h, 7d, or a time")
    ] = "24h",
    as_json: JsonOutcome = False,
) -> None:
    """Create a key with the tenant, roles and limits of another one, which stops working after the overlap.

    A key that ends earlier still does. The new key does not expire.
    """
    from deployments.auth.key_issuing import read_expiry, rotate_entry  # imports pydantic

    with _file_errors(file):
        expires_at = read_expiry(overlap, datetime.now(UTC))
        if expires_at is None:
            raise ValueError("overlap: the old key has to end; give a time such as 24h")
        key, entry, end = rotate_entry(file, id, expires_at)
    _show_key(key, entry, f"added {entry['id']} to {file}; {id} works until {end}", as_json=as_json)


@commands.command()
def expire(
    id: KeyId,
    when: Annotated[str, typer.Argument(metavar="TIME", help="when it stops working: 30d, 12h, 2027-01-31, or never")],
    file: KeysFile,
    as_json: JsonOutcome = False,
) -> None:
    """Set when a key stops working."""
    from deployments.auth.key_issuing import expire_entry, read_expiry  # imports pydantic

    with _file_errors(file):
        expires_at = read_expiry(when, datetime.now(UTC))
        expire_entry(file, id, expires_at)
    report({"id": id, "expires_at": expires_at}, f"{id} expires: {expires_at or 'never'}", as_json=as_json)


@commands.command()
def revoke(id: KeyId, file: KeysFile, as_json: JsonOutcome = False) -> None:
    """Remove a key from the file. A running server refuses it from its next request on."""
    from deployments.auth.key_issuing import remove_entry  # imports pydantic

    with _file_errors(file):
        remove_entry(file, id)
    report({"id": id, "revoked": True}, f"{id} is revoked in {file}", as_json=as_json)


def _read_usage(url: str, tenants: set[str]) -> JsonObject:
    """Return the server's report by key. Exit if it cannot know whether the keys of all these tenants were used."""
    report: JsonObject = call(url, "GET", "/v1/usage", params={"by": "key", "start": _FIRST_DAY})
    if report["usage_days"] == 0:
        fail("--used: the server records no usage, because its usage_days is 0; read the key ids in its log instead")
    if report["tenant"] is not None and tenants - {report["tenant"]}:
        fail(f"--used: this key sees the usage of tenant {report['tenant']} only; use a key with the role admin")
    return report


def _show_key(key: str, entry: JsonObject, done: str, *, as_json: bool) -> None:
    """Print a new key, the only time that it is known."""
    if as_json:
        print_json({"key": key, "entry": entry})
        return
    if done:
        err.print(f"{done}; the key, which is not shown again:", style="dim", markup=False)
    say(key)


@contextmanager
def _file_errors(file: Path | None) -> Iterator[None]:
    """Exit with what is wrong with the keys file or with an option."""
    try:
        yield
    except OSError as exc:
        fail(describe_problem(exc) if exc.filename == str(file) else f"{file}: {exc.strerror or exc}")
    except ValueError as exc:
        message = name_options(str(exc))
        fail(message if file is None or message.startswith("--") else f"{file}: {message}")
