"""Stored keys: find the caller of a key by its hash."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deployments.auth.authenticator import ROLES, Caller, KeyLimits, Role
from deployments.errors import KeyRefused
from deployments.field_problems import describe_problem, field_names
from deployments.yaml_files import load_yaml
from lora_store import LOCAL_TENANT, is_valid_name

_KEY_PREFIX = "lr-"
_KEY_BYTES = 32
_MAX_KEY_CHARS = 512  # longer ones are not hashed
_NO_DIGEST = bytes(32)


def _name(value: str) -> str:
    if not is_valid_name(value):
        raise ValueError("must be 1 to 64 letters, digits, dots, dashes and underscores, and not 'auto'")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as exc:
        raise ValueError("must be between the years 1 and 9999 in UTC") from exc


class KeyEntry(BaseModel):
    """One key of the keys file. Plain sha256 is the right hash, because a key is 256 random bits.

    Salts and slow hashes protect secrets that can be guessed; 2^256 keys cannot be searched. A slow hash per request
    would let anyone keep the server busy with wrong keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, AfterValidator(_name)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Annotated[str, AfterValidator(_name)]
    roles: tuple[Role, ...] = Field(min_length=1)
    limits: KeyLimits = KeyLimits()
    expires_at: Annotated[datetime, AfterValidator(_in_utc)] | None = None  # from then on it is refused

    def caller(self) -> Caller:
        return Caller(self.tenant, frozenset(self.roles), self.id, self.limits)


_ENTRIES = TypeAdapter(list[KeyEntry])


def new_key() -> str:
    """Return a new key of 256 random bits."""
    return _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_key(key: str) -> str:
    """Return the hash under which the keys file stores `key`."""
    return _digest_of(key).hex()


def single_entry(key: str) -> KeyEntry:
    """Return the entry of the setting `api_key`: the local tenant with every role."""
    return KeyEntry(id="api_key", sha256=hash_key(key), tenant=LOCAL_TENANT, roles=ROLES)


def parse_entries(text: str) -> list[KeyEntry]:
    """Parse a keys file, a YAML or JSON list. Raises: ValueError, which quotes no part of the file."""
    entries = _validated(load_entries(text))
    for field in ("id", "sha256"):
        require_unique(field, [getattr(entry, field) for entry in entries])
    return entries


def require_unique(field: str, values: Sequence[str]) -> None:
    """Check that no two values are equal, in linear time. Raises: ValueError, naming both entries."""
    first: dict[str, int] = {}
    for place, value in enumerate(values):
        if (earlier := first.setdefault(value, place)) != place:
            raise ValueError(f"entries {earlier} and {place} have the same {field}")


class KeySet:
    """The keys of one version of the file.

    A presented key is hashed, and the hash is looked up under a secret of this process, so that lookup times reveal
    nothing about the stored hashes. One constant-time comparison decides, whether or not an entry was found.
    """

    def __init__(self, entries: Sequence[KeyEntry], *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._pepper = secrets.token_bytes(32)
        self._callers = {
            self._place(bytes.fromhex(entry.sha256)): (bytes.fromhex(entry.sha256), entry.caller(), entry.expires_at)
            for entry in entries
        }

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, key: str) -> Caller | None:
        """Return the caller that owns `key`, or None. Raises: KeyRefused: it has expired."""
        digest = _digest_of(key[:_MAX_KEY_CHARS])
        stored, caller, expires_at = self._callers.get(self._place(digest), (_NO_DIGEST, None, None))
        if not hmac.compare_digest(stored, digest):
            return None
        if expires_at is not None and self._now() >= expires_at.timestamp():
            raise KeyRefused(
                f"the API key expired at {expires_at:%Y-%m-%dT%H:%M:%SZ}; ask the server's operator for one"
            )
        return caller

    def _place(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._pepper, digest_size=32).digest()


def _digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def load_entries(text: str) -> Any:
    """Return what the JSON or YAML says, unchecked. Raises: ValueError."""
    with suppress(ValueError, RecursionError):
        return json.loads(text, object_pairs_hook=_refuse_repeated)
    try:
        return load_yaml(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        raise ValueError(
            "it is not valid YAML or has a name twice" + ("" if mark is None else f": see line {mark.line + 1}")
        ) from exc


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these fields. Raises: ValueError: a name is there twice, and JSON would keep the last."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _validated(data: object) -> list[KeyEntry]:
    if not isinstance(data, list):
        raise ValueError("it must be a list of keys")
    try:
        return _ENTRIES.validate_python(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        known = field_names(KeyEntry, first["loc"][1:])
        raise ValueError(f"entry {place}: {describe_problem(dict(first), known, shows_value=False)}") from exc
