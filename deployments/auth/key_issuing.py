"""Create keys and add them to a keys file."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from pydantic import ValidationError

from deployments.auth.api_keys import KeyEntry, hash_of, new_key, parse_entries
from deployments.field_problems import describe_problem, field_names
from deployments.json_types import JsonMapping, JsonObject


def make_key(
    tenant: str, roles: Sequence[str], limits: Mapping[str, int | None], id: str | None
) -> tuple[str, JsonObject]:
    """Return a new key and its entry for a keys file. Raises: ValueError, naming the field."""
    key = new_key()
    entry: JsonObject = {
        "id": id or f"{tenant}-{secrets.token_hex(4)}",
        "sha256": hash_of(key),
        "tenant": tenant,
        "roles": list(roles),
    }
    if given := {name: value for name, value in limits.items() if value is not None}:
        entry["limits"] = given
    try:
        KeyEntry.model_validate(entry)
    except ValidationError as exc:
        problems = exc.errors()
        of_given = [problem for problem in problems if id is not None or problem["loc"] != ("id",)]
        first = (of_given or problems)[0]  # a generated id has the tenant's problem as well
        known = field_names(KeyEntry, first["loc"])
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {describe_problem(dict(first), known)}") from exc
    return key, entry


def add_entry(file: Path, entry: JsonMapping) -> None:
    """Append `entry` to the keys file. The file is replaced atomically, by one command at a time.

    Raises: ValueError, OSError.
    """
    target = file.resolve()  # a link stays a link
    with _locked(target.parent):
        old = target.read_text(encoding="utf-8") if target.exists() else ""
        text = with_entry(old, entry)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as made:
            made.write(text)
        os.chmod(made.name, target.stat().st_mode & 0o777 if target.exists() else 0o600)
        os.replace(made.name, target)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, because the file itself is replaced. Waits for other commands."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # releases the lock


def with_entry(text: str, entry: JsonMapping) -> str:
    """Return the keys file `text` with `entry` added. Comments of a YAML list are kept. Raises: ValueError."""
    if not text.strip():
        return block_of(entry)
    num_old = len(parse_entries(text))
    appended = text.rstrip("\n") + "\n" + block_of(entry)
    try:
        if len(parse_entries(appended)) == num_old + 1:
            return appended
    except ValueError:  # JSON, or a YAML list on one line
        pass
    rewritten = json.dumps([*yaml.safe_load(text), dict(entry)], indent=1) + "\n"
    parse_entries(rewritten)
    return rewritten


def block_of(entry: JsonMapping) -> str:
    """Return `entry` as an item of a YAML list."""
    return str(yaml.safe_dump([dict(entry)], sort_keys=False))
