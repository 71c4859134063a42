"""Where a store lies: one URI, read as a pyarrow filesystem and as a Delta table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, LocalFileSystem, S3FileSystem

CONNECT_TIMEOUT_S = 2
REQUEST_TIMEOUT_S = 10  # pyarrow: without a byte; Delta: of a whole request, whose data come in pieces
MAX_ATTEMPTS = 3  # a dead endpoint is told within a second, one that hangs within half a minute

_PORTS = {"http": 80, "https": 443}
_S3_PARAMETERS = frozenset({"endpoint_override", "scheme", "region"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The server that is asked for a bucket. `is_named`: by the URI itself, else it is the cloud's own."""

    host: str
    port: int
    scheme: str
    is_named: bool


@dataclass(frozen=True)
class Location:
    """A folder, `file:///…`, `s3://bucket/…` or `gs://bucket/…`. Credentials come from the environment.

    S3 takes pyarrow's query parameters `endpoint_override` (host:port), `scheme` (http or https) and `region`.
    Raises: ValueError for any other URI.
    """

    uri: str

    def __post_init__(self) -> None:
        allowed = {"file": frozenset[str](), "s3": _S3_PARAMETERS, "gs": frozenset[str]()}
        scheme = self._parts.scheme
        if scheme not in allowed:
            raise ValueError(f"a store is a folder, s3:// or gs://, got {self.uri!r}")
        if unknown := sorted(self._parameters.keys() - allowed[scheme]):
            raise ValueError(f"parameter {unknown[0]!r} of a {scheme}:// store is not known")
        if self._parameters.get("scheme", "https") not in _PORTS:
            raise ValueError(f"scheme is http or https, got {self._parameters['scheme']!r}")
        if any(mark in self._parameters.get("endpoint_override", "") for mark in "/@?#\\"):
            raise ValueError(f"endpoint_override is host:port, got {self._parameters['endpoint_override']!r}")
        if scheme != "file" and ("@" in self._parts.netloc or not self._parts.netloc):
            raise ValueError(
                f"a {scheme}:// store names its bucket and no credentials, which come from the environment"
            )

    @property
    def is_local(self) -> bool:
        return self._parts.scheme == "file"

    @property
    def is_s3(self) -> bool:
        return self._parts.scheme == "s3"

    @property
    def region(self) -> str | None:
        """The region that the URI names; without one the environment does."""
        return self._parameters.get("region")

    @property
    def filesystem_path(self) -> str:
        """This place's path on its filesystem: for S3 and GCS the bucket, then the key."""
        path = unquote(self._parts.path)
        return path if self.is_local else f"{self._parts.netloc}{path}".rstrip("/")

    @property
    def endpoint(self) -> Endpoint | None:
        """None for a folder."""
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
        """The same place, its endpoint's name replaced by one of its addresses."""
        assert self.endpoint is not None and self.endpoint.is_named
        host = f"[{address}]" if ":" in address else address
        query = urlencode(self._parameters | {"endpoint_override": f"{host}:{self.endpoint.port}"})
        return Location(self._parts._replace(query=query).geturl())

    def child(self, name: str) -> Location:
        """The place called `name` below this one."""
        parts = self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{name}")
        return Location(parts.geturl())

    def filesystem(self) -> tuple[FileSystem, str]:
        """The filesystem, and this place's path on it."""
        path = self.filesystem_path
        if self.is_local:
            return LocalFileSystem(), path
        if self._parts.scheme == "s3":
            return _s3_filesystem(self._parameters), path
        files, _ = FileSystem.from_uri(f"gs://{self._parts.netloc}/?retry_limit_seconds={REQUEST_TIMEOUT_S}")
        return files, path

    @property
    def delta_uri(self) -> str:
        """What `deltalake` calls this place."""
        return unquote(self._parts.path) if self.is_local else self._parts._replace(query="").geturl()

    @property
    def storage_options(self) -> dict[str, str]:
        """What `deltalake` needs beside `delta_uri`."""
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


def _s3_filesystem(parameters: dict[str, str]) -> S3FileSystem:
    return S3FileSystem(
        **parameters,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        allow_delayed_open=True,  # a small object is one request, not three
        background_writes=False,
    )
