"""Create keys, and add, change and remove entries of a keys file."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from pydantic import ValidationError

from deployments.auth.api_keys import KeyEntry, hash_key, load_entries, new_key, parse_entries
from deployments.field_problems import describe_problem, did_you_mean, field_names
from deployments.json_types import JsonMapping, JsonObject

_MAX_TENANT_CHARS = 55  # a generated id adds 9 characters to them, and may have 64


def read_expiry(text: str, now: datetime) -> str | None:
    """Return the time that `30d`, `12h`, `2027-01-31`, an ISO time or `never` names, as a keys file has it.

    A day without a time ends the key at its beginning, in UTC. Raises: ValueError.
    """
    if text == "never":
        return None
    try:
        if found := re.fullmatch(r"(\d{1,5})([hd])", text):
            at = now + timedelta(hours=int(found[1]) * (24 if found[2] == "d" else 1))
        else:
            at = datetime.fromisoformat(text)
        return _iso_time(at.replace(tzinfo=UTC) if at.tzinfo is None else at)
    except (ValueError, OverflowError) as exc:
        raise ValueError(
            f"{text!r} is not a time: give 30d, 12h, a day as 2027-01-31, a time as 2027-01-31T18:00Z, or never"
        ) from exc


def _iso_time(at: datetime) -> str:
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def make_key(
    tenant: str,
    roles: Sequence[str],
    limits: Mapping[str, int | None],
    id: str | None,
    expires_at: str | None = None,
) -> tuple[str, JsonObject]:
    """Return a new key and its entry for a keys file. Raises: ValueError, naming the field."""
    key = new_key()
    entry: JsonObject = {
        "id": id or f"{tenant[:_MAX_TENANT_CHARS]}-{secrets.token_hex(4)}",
        "sha256": hash_key(key),
        "tenant": tenant,
        "roles": list(roles),
    }
    if given := {name: value for name, value in limits.items() if value is not None}:
        entry["limits"] = given
    if expires_at is not None:
        entry["expires_at"] = expires_at
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
    _rewrite(file, lambda text: with_entry(text, entry))


def remove_entry(file: Path, id: str) -> None:
    """Remove the entry with this id, as `add_entry` adds one. Raises: ValueError without such an entry; OSError."""
    _replace(file, id, lambda entry: [])


def expire_entry(file: Path, id: str, expires_at: str | None) -> None:
    """Let the key with this id end then, or never. Raises: ValueError without such an entry; OSError."""
    _replace(file, id, lambda entry: [_expiring(entry, expires_at)])


def rotate_entry(file: Path, id: str, expires_at: str) -> tuple[str, JsonObject, str]:
    """Add a new key next to the one with this id, which ends then, or earlier if it did before.

    Return the new key, its entry, and the end of the old one. The new one has the tenant, the roles and the limits of
    the old one. Raises: ValueError, OSError.
    """
    made: list[tuple[str, JsonObject, str]] = []

    def change(entry: JsonObject) -> list[JsonObject]:
        key, new = make_key(entry["tenant"], entry["roles"], entry.get("limits", {}), None)
        before = KeyEntry.model_validate(entry).expires_at
        end = expires_at if before is None else min(_iso_time(before), expires_at)  # equal forms sort as times
        made[:] = [(key, new, end)]
        return [_expiring(entry, end), new]

    _replace(file, id, change)
    return made[0]


def _replace(file: Path, id: str, change: Callable[[JsonObject], list[JsonObject]]) -> None:
    if not file.exists():
        raise ValueError("no such file")
    _rewrite(file, lambda text: with_replaced(text, id, change))


def _expiring(entry: JsonObject, expires_at: str | None) -> JsonObject:
    kept = {name: value for name, value in entry.items() if name != "expires_at"}
    return kept if expires_at is None else kept | {"expires_at": expires_at}


def _rewrite(file: Path, change: Callable[[str], str]) -> None:
    target = file.resolve()  # a link stays a link
    with _locked(target.parent) as folder:
        text = change(target.read_text(encoding="utf-8") if target.exists() else "")
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as made:
            try:
                made.write(text)
                made.flush()
                if target.exists():
                    _keep_readers(made.fileno(), target.stat())
                os.fsync(made.fileno())
                os.replace(made.name, target)
            except BaseException:
                os.unlink(made.name)
                raise
        os.fsync(folder)  # a key that was revoked does not come back with a power failure


def _keep_readers(descriptor: int, before: os.stat_result) -> None:
    """Give a new file the mode and the owners of the file that it replaces. Raises: ValueError.

    The server may run as another user, who must be able to read it.
    """
    os.fchmod(descriptor, before.st_mode & 0o777)
    for owner in ((before.st_uid, -1), (-1, before.st_gid)):  # a group may be given by its members
        with suppress(OSError):
            os.fchown(descriptor, *owner)
    made = os.fstat(descriptor)
    is_kept = (made.st_uid, made.st_gid) == (before.st_uid, before.st_gid)
    if not is_kept and not before.st_mode & stat.S_IROTH:
        raise ValueError(
            "belongs to another user or group, who could not read it after this change; run the command as its owner"
            " or as root"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the folder, because the file itself is replaced, and yield its descriptor. Wait for other commands."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)  # releases the lock


def with_entry(text: str, entry: JsonMapping) -> str:
    """Return the keys file `text` with `entry` added. Comments of a YAML list are kept. Raises: ValueError."""
    appended = text.rstrip("\n") + "\n" * bool(text.strip()) + format_item(entry)
    if load_entries(text) is None:  # an empty file, or one of comments
        return appended
    num_old = len(parse_entries(text))
    try:
        if len(parse_entries(appended)) == num_old + 1:
            return appended
    except ValueError:  # JSON, or a YAML list on one line
        pass
    rewritten = _dump_json([*load_entries(text), dict(entry)])
    parse_entries(rewritten)
    return rewritten


def with_replaced(text: str, id: str, change: Callable[[JsonObject], list[JsonObject]]) -> str:
    """Return `text` with those entries that `change` makes of one. Comments of other entries are kept.

    Raises: ValueError.
    """
    ids = [entry.id for entry in parse_entries(text)]
    if id not in ids:
        raise ValueError(f"no key has the id {id!r}{did_you_mean(id, ids)}; `loraretriever keys list` prints the ids")
    place, lines, entries = ids.index(id), text.splitlines(keepends=True), load_entries(text)
    made = change(entries[place])
    rewritten = _dump_json([*entries[:place], *made, *entries[place + 1 :]])
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # JSON that is indented with tabs
        return rewritten
    assert isinstance(root, yaml.SequenceNode)
    nodes = root.value
    start = nodes[place].start_mark.line
    end = nodes[place + 1].start_mark.line if place + 1 < len(nodes) else len(lines)
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1  # comments before the next entry are that one's
    wanted = [*ids[:place], *(entry["id"] for entry in made), *ids[place + 1 :]]
    left = "".join([*lines[:start], *map(format_item, made), *lines[end:]]) if wanted else "[]\n"
    try:
        if [entry.id for entry in parse_entries(left)] == wanted:
            return left
    except ValueError:  # JSON, or a YAML list on one line
        pass
    return rewritten


def _dump_json(entries: Sequence[JsonMapping]) -> str:
    return json.dumps(entries, indent=1, default=str) + "\n"  # YAML reads a time without quotes as a time


def format_item(entry: JsonMapping) -> str:
    """Return `entry` as an item of a YAML list."""
    return str(yaml.safe_dump([dict(entry)], sort_keys=False))
