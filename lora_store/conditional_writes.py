"""Check that an S3 endpoint honours conditional writes. Without them two writers could commit the same generation."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from lora_store.errors import ConditionalWritesMissing
from lora_store.location import REQUEST_TIMEOUT_S, Location

logger = logging.getLogger(__name__)

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_CONDITION = {"if-none-match": "*"}
_REFUSED = (409, 412)  # S3's answers to a write whose condition is false
_PERHAPS_UNKNOWN = (400, 501)  # from an endpoint without conditions; 400 also means a wrong region or an expired token
_FOLDER = "probes"
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # in deltalake's order
_REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
_DEFAULT_REGION = "us-east-1"


def check_conditional_writes(store: Location, environment: Mapping[str, str]) -> None:
    """Write one new object twice on the condition that it does not exist, and require the second write to fail.

    Skip folders (the file system guarantees it) and gs:// (always Google's own endpoint). Sign S3 requests with the
    keys of `environment`; skip the check without keys, since credentials from a role mean AWS, which honours the
    condition. Like deltalake and pyarrow, take region and endpoint from `environment` if the URI names none.
    Log a warning if the answers prove nothing. Raises: ConditionalWritesMissing.
    """
    key_id, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    if not store.is_s3:
        return
    if not key_id or not secret:
        logger.info("skipped the check for conditional writes: AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is not set")
        return
    region = store.region or _first(environment, _REGION_VARIABLES) or _DEFAULT_REGION
    path = store.child(_FOLDER).child(uuid4().hex).filesystem_path
    url = f"{_endpoint_url(store, region, environment)}/{quote(path, safe='/-._~')}"
    try:
        _probe(url, _Signer(key_id, secret, environment.get("AWS_SESSION_TOKEN"), region))
    except (OSError, HTTPException, ValueError) as exc:  # ValueError: the environment names an invalid URL
        logger.warning("conditional writes could not be checked at %s: %s", url, exc)


def _probe(url: str, signer: _Signer) -> None:
    """Write the object at `url`, check the answers and delete it. Raises: as `_status`, ConditionalWritesMissing."""
    try:
        first, second = [_status("PUT", url, signer, _CONDITION) for _ in range(2)]
        is_ignored = 200 <= first < 300 and 200 <= second < 300
        is_unknown = first in _PERHAPS_UNKNOWN and 200 <= _status("PUT", url, signer) < 300
    finally:
        _delete(url, signer)
    if is_ignored or is_unknown:
        raise ConditionalWritesMissing(first, second)
    if not 200 <= first < 300 or second not in _REFUSED:
        logger.warning("conditional writes could not be checked at %s: the status was %d, then %d", url, first, second)


def _delete(url: str, signer: _Signer) -> None:
    """Delete the object and log a failure. (pyarrow's deletion would leave a folder marker.)"""
    try:
        status = _status("DELETE", url, signer)
    except (OSError, HTTPException, ValueError) as exc:
        logger.warning("the probe object %s could not be deleted: %s", url, exc)
        return
    if status >= 300 and status != 404:
        logger.warning("the probe object %s could not be deleted: the status was %d", url, status)


def _first(environment: Mapping[str, str], names: Iterable[str]) -> str | None:
    """Return the first variable that is set and not empty."""
    return next((environment[name] for name in names if environment.get(name)), None)


def _endpoint_url(store: Location, region: str, environment: Mapping[str, str]) -> str:
    """Return the endpoint's URL: from the URI, from the environment, or AWS's own in that region."""
    endpoint = store.endpoint
    assert endpoint is not None
    if endpoint.is_named:
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        return f"{endpoint.scheme}://{host}:{endpoint.port}"
    return (_first(environment, _ENDPOINT_VARIABLES) or f"https://s3.{region}.amazonaws.com").rstrip("/")


def _status(method: str, url: str, signer: _Signer, conditions: Mapping[str, str] | None = None) -> int:
    """Send a request without a body and return its HTTP status. Raises: OSError, HTTPException, ValueError."""
    headers = signer.headers(method, url, conditions or {}, datetime.now(UTC))
    request = Request(url, data=b"" if method == "PUT" else None, headers=headers, method=method)
    try:
        with urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            return int(response.status)
    except HTTPError as exc:
        return exc.code


@dataclass(frozen=True, slots=True)
class _Signer:
    """Signs requests that have no body. Source: AWS Signature Version 4, "Create a signed request"."""

    key_id: str
    secret: str
    token: str | None
    region: str

    def headers(self, method: str, url: str, conditions: Mapping[str, str], now: datetime) -> dict[str, str]:
        """Return all headers of the request. `url` must be quoted and have no query."""
        parts = urlsplit(url)
        default_port = {"http": 80, "https": 443}.get(parts.scheme)
        host = parts.netloc.removesuffix(f":{default_port}")  # urllib sends it like this
        stamp = now.strftime("%Y%m%dT%H%M%SZ")
        headers = {"host": host, "x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": stamp, **conditions}
        if self.token:
            headers["x-amz-security-token"] = self.token
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = "\n".join([method, parts.path, "", lines, names, _EMPTY_SHA256])
        scope = f"{stamp[:8]}/{self.region}/s3/aws4_request"
        to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = f"AWS4{self.secret}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.new(key, to_sign.encode(), "sha256").hexdigest()
        credential = f"Credential={self.key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
        return headers | {"Authorization": f"AWS4-HMAC-SHA256 {credential}"}
