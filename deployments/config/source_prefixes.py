"""The URIs from which adapters may be published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from lora_store.location import Location

HUB, RUNS, MODELS = "hf", "runs", "models"
_BEGINNINGS = {
    "s3": "s3://",
    "gs": "gs://",
    "file": "file://",
    HUB: "hf://",
    RUNS: "runs:/",
    MODELS: "models:/",
}
OVER_HTTP = (HUB, RUNS, MODELS)  # a model hub and an MLflow server, whose addresses the environment names
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A URI as scheme and parts, which are compared as they are, not decoded.

    Parts: bucket and key; an absolute path; owner, repository and folders of a hub; run and folders, or registered
    model and folders of MLflow. `revision`: the revision of a repository, the version or alias of a model.
    """

    scheme: str
    parts: tuple[str, ...]
    revision: str = ""

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Parse a URI. Raises: ValueError: it is not allowed, or a part of it is ambiguous."""
        scheme, separator, _ = uri.partition(":")
        beginning = _BEGINNINGS.get(scheme, "") if separator else ""
        if not beginning or not uri.startswith(beginning):
            raise ValueError(f"must begin with one of {', '.join(_BEGINNINGS.values())}")
        rest = uri.removeprefix(beginning)
        if any(mark in rest for mark in "?#\\") or not rest.isprintable():
            raise ValueError("must not contain a query, a fragment, backslashes or control characters")
        if scheme in OVER_HTTP:
            return cls(scheme, *_of_server(scheme, rest))
        host, _, path = rest.partition("/")
        if "@" in host or ":" in host or (not host) != (scheme == "file"):
            raise ValueError("must name a bucket, or with file:// an absolute path, without credentials")
        return cls(scheme, _plain_parts([*([host] if host else []), *path.rstrip("/").split("/")]))

    def is_below(self, other: SourceUri) -> bool:
        """Return whether this is `other` or inside it. Without a revision, `other` means every revision."""
        is_inside = self.scheme == other.scheme and self.parts[: len(other.parts)] == other.parts
        return is_inside and other.revision in ("", self.revision)


def _plain_parts(parts: list[str]) -> tuple[str, ...]:
    if any(part in ("", ".", "..") for part in parts[:-1]) or parts[-1] in (".", ".."):
        raise ValueError("must not contain empty parts, '.' or '..'")
    return tuple(part for part in parts if part)


def _of_server(scheme: str, rest: str) -> tuple[tuple[str, ...], str]:
    """Return (parts, revision) of `owner/repository@revision`, `run/folder`, `model/version` or `model@alias`."""
    parts = list(_plain_parts(rest.rstrip("/").split("/")))
    place = {HUB: 1, MODELS: 0}.get(scheme)  # the part that may have a revision
    revision = ""
    if place is not None and len(parts) > place:
        parts[place], at, revision = parts[place].partition("@")
        if at and not _PLAIN.fullmatch(revision):
            raise ValueError("must have a branch, tag, commit or alias of A-Za-z0-9._- after @")
        if parts[place] in (".", "..") or revision in (".", ".."):
            raise ValueError("must not contain empty parts, '.' or '..'")
        if scheme == MODELS and not at and len(parts) > 1:
            revision = parts.pop(1)
            if not revision.isdecimal():
                raise ValueError("must name a version or an alias, as models:/NAME/3 or models:/NAME@champion")
    if not all(_PLAIN.fullmatch(part) for part in parts[: 2 if scheme == HUB else 1]):
        raise ValueError("must have names of A-Za-z0-9._-")
    return tuple(parts), revision


@dataclass(frozen=True, slots=True)
class SourcePrefix:
    """A URI that the operator allows, with everything below it. `location` reads it and may name an endpoint.

    `location` is None for what the hub and MLflow serve.
    """

    uri: SourceUri
    location: Location | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a prefix. Raises: ValueError, naming `text` without what may be a secret."""
        try:
            uri = SourceUri.parse(text.partition("?")[0])
            return cls(uri, None if uri.scheme in OVER_HTTP else Location(text))
        except ValueError as exc:
            shown = re.sub("(?<=//)[^/]*@", "…@", re.sub(r"\?.*", "?…", text, flags=re.DOTALL))
            raise ValueError(f"source prefix {shown!r} {exc}") from exc
