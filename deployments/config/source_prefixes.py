"""The URIs from which adapters may be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lora_store.location import Location

SCHEMES = ("s3", "gs", "file")


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A place by scheme and parts (bucket and key, or an absolute path), compared part by part and never decoded."""

    scheme: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises: ValueError: it has a part that could mean another place."""
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme not in SCHEMES:
            raise ValueError(f"must begin with one of {', '.join(f'{known}://' for known in SCHEMES)}")
        if any(mark in rest for mark in "?#\\") or not rest.isprintable():
            raise ValueError("must be without query, fragment, backslash and control characters")
        host, _, path = rest.partition("/")
        if "@" in host or ":" in host or (not host) != (scheme == "file"):
            raise ValueError("must name a bucket, or with file:// an absolute path, and hold no credentials")
        parts = (*([host] if host else []), *path.rstrip("/").split("/"))
        if any(part in ("", ".", "..") for part in parts[:-1]) or parts[-1] in (".", ".."):
            raise ValueError("must be without empty parts, '.' and '..'")
        return cls(scheme, tuple(part for part in parts if part))

    def is_below(self, other: SourceUri) -> bool:
        return self.scheme == other.scheme and self.parts[: len(other.parts)] == other.parts


@dataclass(frozen=True, slots=True)
class SourcePrefix:
    """What an operator allows: everything at or below `uri`, read through `location`, which may name an endpoint."""

    uri: SourceUri
    location: Location

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises: ValueError, naming `text`."""
        try:
            return cls(SourceUri.parse(text.partition("?")[0]), Location(text))
        except ValueError as exc:
            raise ValueError(f"source prefix {text!r} {exc}") from exc
