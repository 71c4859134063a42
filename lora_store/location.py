"""The location of a store: one URI, opened as a pyarrow filesystem and as a Delta table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, LocalFileSystem, S3FileSystem

CONNECT_TIMEOUT_S = 2
REQUEST_TIMEOUT_S = 10  # pyarrow: time without a byte; Delta: time of a whole request, which transfers one piece
MAX_ATTEMPTS = 3  # a dead endpoint is reported within a second, one that hangs within half a minute

DEFAULT_CACHE_DIR = Path.home() / ".cache" / "loraretriever"  # holds converted models, compiled kernels and weights
_PORTS = {"http": 80, "https": 443}
_S3_PARAMETERS = frozenset({"endpoint_override", "scheme", "region"})
_NO_STORE = re.compile(r"%[0-9A-Fa-f]{2}|[\x00-\x1f\x7f]")  # Delta decodes the first and refuses the others
_NO_FOLDER = re.compile(r"\\")  # Delta reads it as a slash
_NO_PREFIX = re.compile(r"[\\\[\]|^#]|//")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The server of a bucket. `is_named`: the URI names it; otherwise it is the cloud provider's own."""

    host: str
    port: int
    scheme: str
    is_named: bool


@dataclass(frozen=True)
class Location:
    """A folder, `file:///…`, `s3://bucket/…` or `gs://bucket/…`. Credentials are read from the environment.

    S3 URIs accept pyarrow's query parameters `endpoint_override` (host:port), `scheme` (http or https) and `region`.
    Raises: ValueError for any other URI.
    """

    uri: str

    def __post_init__(self) -> None:
        allowed = {"file": frozenset[str](), "s3": _S3_PARAMETERS, "gs": frozenset[str]()}
        scheme = self._parts.scheme
        if scheme not in allowed:
            raise ValueError(f"a store must be a folder, s3://… or gs://…, got {scheme}://…")
        if unknown := sorted(self._parameters.keys() - allowed[scheme]):
            known = ", ".join(sorted(allowed[scheme])) or "none"
            raise ValueError(f"unknown parameter {unknown[0]!r} of a {scheme}:// store; allowed: {known}")
        if self._parameters.get("scheme", "https") not in _PORTS:
            raise ValueError(f"scheme must be http or https, got {self._parameters['scheme']!r}")
        if any(mark in self._parameters.get("endpoint_override", "") for mark in "/@?#\\"):
            raise ValueError("endpoint_override must be host:port, without credentials")
        if scheme != "file" and ("@" in self._parts.netloc or not self._parts.netloc):
            raise ValueError(
                f"a {scheme}:// store must name its bucket and no credentials: set those in the environment"
            )

    @classmethod
    def of_store(cls, uri: str) -> Location:
        """Return the location of a store. Raises: ValueError also for a path that `deltalake` reads in another way."""
        location = cls(uri)
        path, written = location.filesystem_path, location._parts
        found = _NO_STORE.search(path)
        if found is None and location.is_local:
            found = _NO_FOLDER.search(path)
        elif found is None:
            found = _NO_PREFIX.search(f"{written.path.rstrip('/')}{'#' if written.fragment else ''}")
        if found:
            raise ValueError(f"the path of a store cannot have {found[0]!r}; name another folder")
        return location

    @property
    def is_local(self) -> bool:
        return self._parts.scheme == "file"

    @property
    def is_s3(self) -> bool:
        return self._parts.scheme == "s3"

    @property
    def region(self) -> str | None:
        """The region in the URI, or None: then the environment decides."""
        return self._parameters.get("region")

    @property
    def filesystem_path(self) -> str:
        """The path on the filesystem; for S3 and GCS the bucket, then the key."""
        path = unquote(self._parts.path)
        return path if self.is_local else f"{self._parts.netloc}{path}".rstrip("/")

    @property
    def endpoint(self) -> Endpoint | None:
        """The server of the bucket, None for a folder."""
        if self.is_local:
            return None
        scheme = self._parameters.get("scheme", "https")
        named = urlsplit(f"//{self._parameters.get('endpoint_override', '')}")
        if named.hostname:
            return Endpoint(named.hostname, named.port or _PORTS[scheme], scheme, is_named=True)
        host = (
            f"s3.{self.region or 'us-east-1'}.amazonaws.com" if self._parts.scheme == "s3" else "storage.googleapis.com"
        )
        return Endpoint(host, _PORTS[scheme], scheme, is_named=False)

    def at_address(self, address: str) -> Location:
        """Return this location with the endpoint's host replaced by one of its addresses."""
        assert self.endpoint is not None and self.endpoint.is_named
        host = f"[{address}]" if ":" in address else address
        query = urlencode(self._parameters | {"endpoint_override": f"{host}:{self.endpoint.port}"})
        return Location(self._parts._replace(query=query).geturl())

    def child(self, name: str) -> Location:
        """Return the location `name` below this one."""
        parts = self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{name}")
        return Location(parts.geturl())

    def filesystem(self, request_timeout_s: int = REQUEST_TIMEOUT_S) -> tuple[FileSystem, str]:
        """Return the filesystem and the path on it."""
        path = self.filesystem_path
        if self.is_local:
            return LocalFileSystem(), path
        if self._parts.scheme == "s3":
            return _s3_filesystem(self._parameters, request_timeout_s), path
        files, _ = FileSystem.from_uri(f"gs://{self._parts.netloc}/?retry_limit_seconds={request_timeout_s}")
        return files, path

    @property
    def delta_uri(self) -> str:
        """The location as `deltalake` writes it."""
        return unquote(self._parts.path) if self.is_local else self._parts._replace(query="").geturl()

    @property
    def storage_options(self) -> dict[str, str]:
        """The options that `deltalake` needs in addition to `delta_uri`."""
        if self.is_local:
            return {}
        options = {
            "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
            "timeout": f"{REQUEST_TIMEOUT_S}s",
            "max_retries": str(MAX_ATTEMPTS - 1),
            "retry_timeout": f"{MAX_ATTEMPTS * REQUEST_TIMEOUT_S}s",
        }
        scheme = self._parameters.get("scheme", "https")
        if endpoint := self._parameters.get("endpoint_override"):
            options |= {"aws_endpoint": f"{scheme}://{endpoint}", "aws_allow_http": str(scheme == "http").lower()}
        if region := self._parameters.get("region"):
            options["aws_region"] = region
        return options

    @cached_property
    def _parts(self) -> SplitResult:
        if "://" in self.uri:
            return urlsplit(self.uri)
        return urlsplit(Path(self.uri).absolute().as_uri())

    @property
    def _parameters(self) -> dict[str, str]:
        return dict(parse_qsl(self._parts.query, keep_blank_values=True))


def _s3_filesystem(parameters: dict[str, str], request_timeout_s: int) -> S3FileSystem:
    return S3FileSystem(
        **parameters,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=request_timeout_s,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        allow_delayed_open=True,  # write a small object with one request instead of three
        background_writes=False,
    )
