"""The URIs from which adapters may be published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lora_store.location import Location

SCHEMES = ("s3", "gs", "file")
_FROM_HUB = "download it with `hf download REPOSITORY --local-dir FOLDER`, and publish the folder"


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A URI as scheme and parts (bucket and key, or an absolute path). Parts are compared as they are, not decoded."""

    scheme: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Parse a URI. Raises: ValueError: it is not allowed, or a part of it is ambiguous."""
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            remedy = f"; {_FROM_HUB}" if scheme == "hf" else ""
            raise ValueError(f"must begin with one of {known}{remedy}")
        if any(mark in rest for mark in "?#\\") or not rest.isprintable():
            raise ValueError("must not contain a query, a fragment, backslashes or control characters")
        host, _, path = rest.partition("/")
        if "@" in host or ":" in host or (not host) != (scheme == "file"):
            raise ValueError("must name a bucket, or with file:// an absolute path, without credentials")
        parts = (*([host] if host else []), *path.rstrip("/").split("/"))
        if any(part in ("", ".", "..") for part in parts[:-1]) or parts[-1] in (".", ".."):
            raise ValueError("must not contain empty parts, '.' or '..'")
        return cls(scheme, tuple(part for part in parts if part))

    def is_below(self, other: SourceUri) -> bool:
        return self.scheme == other.scheme and self.parts[: len(other.parts)] == other.parts


@dataclass(frozen=True, slots=True)
class SourcePrefix:
    """A URI that the operator allows, with everything below it. `location` reads it and may name an endpoint."""

    uri: SourceUri
    location: Location

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a prefix. Raises: ValueError, naming `text`."""
        try:
            return cls(SourceUri.parse(text.partition("?")[0]), Location(text))
        except ValueError as exc:
            raise ValueError(f"source prefix {text!r} {exc}") from exc
