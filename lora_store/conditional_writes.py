"""Whether an S3 endpoint honours conditional writes, without which two writers could both take one generation."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen
from uuid import uuid4

from lora_store.errors import ConditionalWritesMissing
from lora_store.files import store_errors
from lora_store.location import REQUEST_TIMEOUT_S, Location

logger = logging.getLogger(__name__)

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_REFUSED = (409, 412)  # as S3 answers to a write whose condition does not hold
_UNKNOWN_TO_IT = (400, 501)  # as endpoints answer that know no conditions
_FOLDER = "probes"


def check_conditional_writes(store: Location, environment: Mapping[str, str]) -> None:
    """Write one new object twice on the condition that it does not exist; the endpoint must refuse the second write.

    Nothing is asked for a folder, where the file system decides, nor for gs://, which always is Google's own endpoint.
    An S3 endpoint is asked with the keys of `environment`; with credentials from elsewhere (a role) it is AWS, which
    honours the condition. Raises: ConditionalWritesMissing; StoreUnavailable.
    """
    key_id, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    if not store.is_s3:
        return
    if not key_id or not secret:
        logger.info("conditional writes are not probed: no AWS_ACCESS_KEY_ID in the environment")
        return
    place = store.child(_FOLDER).child(uuid4().hex)
    keys = _Keys(key_id, secret, environment.get("AWS_SESSION_TOKEN"))
    try:
        first, second = [_status("PUT", place, keys, {"if-none-match": "*"}) for _ in range(2)]
    finally:
        _status("DELETE", place, keys, {})  # pyarrow's own deletion leaves a marker of the folder
    if first in _UNKNOWN_TO_IT or 200 <= second < 300:
        raise ConditionalWritesMissing(first, second)
    if not 200 <= first < 300 or second not in _REFUSED:
        logger.warning("conditional writes could not be probed: the endpoint answered %d and %d", first, second)


@dataclass(frozen=True, slots=True)
class _Keys:
    key_id: str
    secret: str
    token: str | None


def _status(method: str, place: Location, keys: _Keys, conditions: Mapping[str, str]) -> int:
    """The HTTP status of a request without a body on the object there."""
    url, headers = _signed(method, place, keys, conditions, datetime.now(UTC))
    request = Request(url, data=b"" if method == "PUT" else None, headers=headers, method=method)
    with store_errors():
        try:
            with urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return int(response.status)
        except HTTPError as exc:
            return exc.code


def _signed(
    method: str, place: Location, keys: _Keys, conditions: Mapping[str, str], now: datetime
) -> tuple[str, dict[str, str]]:
    """The URL and the headers, signed. Source: AWS Signature Version 4, "Create a signed request"."""
    endpoint, region = place.endpoint, place.region
    assert endpoint is not None
    default_port = {"http": 80, "https": 443}[endpoint.scheme]
    host = endpoint.host if endpoint.port == default_port else f"{endpoint.host}:{endpoint.port}"
    path = "/" + quote(place.filesystem_path, safe="/-._~")
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": host, "x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": stamp, **conditions}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = "\n".join([method, path, "", lines, names, _EMPTY_SHA256])
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.new(key, to_sign.encode(), "sha256").hexdigest()
    credential = f"Credential={keys.key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    return f"{endpoint.scheme}://{host}{path}", headers | {"Authorization": f"AWS4-HMAC-SHA256 {credential}"}
