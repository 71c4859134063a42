"""Read adapters from a model hub or an MLflow server over HTTP, with the credentials in the server's environment.

Bytes come from these two servers alone: a model version that was registered with another place, such as a file of this
machine, is never opened. No file is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import httpx
from huggingface_hub import constants, hf_hub_url

from deployments.config.source_prefixes import HUB, RUNS, SourceUri
from deployments.errors import SourceMissing, SourceRefused, SourceUnavailable
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import ADAPTER_FILES
from deployments.publishing.ssrf_guard import Resolve, pin_redirect, resolve_by_system
from lora_store import AdapterRefused

CHUNK_BYTES = 1 << 20
_TIMEOUT = httpx.Timeout(10.0, read=30.0)  # between two pieces, not of a whole file
_MAX_LIST_BYTES = 16 << 20
_API, _ARTIFACTS = "/api/2.0/mlflow", "/api/2.0/mlflow-artifacts/artifacts"
_REFUSED, _MISSING = (401, 403), (400, 404)  # MLflow 3 answers 400 for an unknown alias
TakeBytes = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter. `num_bytes`: as the server announces it, 0 if it does not."""

    name: str
    url: str
    params: Mapping[str, str]
    num_bytes: int


class BoundedCopy:
    """Writes files into a folder, of at most `max_bytes` together."""

    def __init__(self, name: str, max_bytes: int) -> None:
        self._name, self._max_bytes, self._left = name, max_bytes, max_bytes

    def write(self, target: BinaryIO, chunk: bytes) -> None:
        """Write `chunk`. Raises: AdapterRefused above the bound."""
        self._left -= len(chunk)
        if self._left < 0:
            raise AdapterRefused(self._name, [f"its files have more than {self._max_bytes} bytes"])
        target.write(chunk)


def copy_over_http(
    uri: str,
    place: SourceUri,
    work: Path,
    max_bytes: int,
    take: TakeBytes,
    environment: Mapping[str, str] = os.environ,
    *,
    resolve: Resolve = resolve_by_system,
) -> Path:
    """Copy the adapter's files at `place` to `work`, and return it.

    `take` is called with the number of bytes before files are copied, and may wait.
    Raises: SourceRefused, SourceMissing, SourceUnavailable; AdapterRefused above `max_bytes`.
    """
    is_hub = place.scheme == HUB
    with (
        _translate_errors(uri),
        _hub(uri, environment, resolve) if is_hub else _mlflow(uri, environment) as client,
    ):
        list_files = _hub_files if is_hub else _mlflow_files
        files = list_files(uri, place, client, environment)
        if not files:
            raise SourceMissing(uri)
        take(min(sum(file.num_bytes for file in files), max_bytes))
        copy = BoundedCopy(place.parts[-1], max_bytes)
        for file in files:
            with client.stream("GET", file.url, params=file.params) as answer, (work / file.name).open("wb") as target:
                answer.raise_for_status()
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    copy.write(target, chunk)
    return work


@contextmanager
def _translate_errors(uri: str) -> Iterator[None]:
    """Translate errors of HTTP. Neither the new error nor its traceback quotes a URL or a header of a request.

    Both are logged, and URLs and headers may have credentials.
    """
    try:
        yield
    except httpx.HTTPStatusError as exc:
        answer = exc.response
        if answer.status_code in _MISSING:
            raise SourceMissing(uri) from None
        if answer.status_code in _REFUSED:
            raise SourceRefused(uri, "cannot be read with this server's credentials") from None
        cause = f"{exc.request.url.host} answered {answer.status_code} {answer.reason_phrase}".rstrip()
        raise SourceUnavailable(uri, cause) from None
    except (httpx.LocalProtocolError, httpx.InvalidURL, UnicodeEncodeError) as exc:  # their texts quote what was sent
        remedy = "check the address and the credentials in the server's environment"
        raise SourceUnavailable(uri, f"{type(exc).__name__}: {remedy}") from None
    except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as exc:
        raise SourceUnavailable(uri, f"{type(exc).__name__}: {exc}") from exc


def _read_variable(environment: Mapping[str, str], name: str) -> str:
    """Return a variable without the space around it, such as the last newline of a file; "" if it is not set."""
    return environment.get(name, "").strip()


def _hub(uri: str, environment: Mapping[str, str], resolve: Resolve) -> httpx.Client:
    """Return a client of the hub. It follows redirects to the hub's file servers, without the token.

    Each hop is checked before it is sent. Over http the checked address replaces the name, as in `pin_public_address`.
    A proxy that the environment names resolves names itself, so that it decides where they may lead.
    """
    token = _read_variable(environment, "HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hub = _host_and_port(httpx.URL(_endpoint(environment)))

    def check(request: httpx.Request) -> None:
        target = _host_and_port(request.url)
        if target == hub or _has_proxy(request.url):
            return
        address = pin_redirect(uri, hub, target, resolve)
        if request.url.scheme == "http":
            request.url = request.url.copy_with(host=address)  # the header Host keeps the name

    return httpx.Client(headers=headers, timeout=_TIMEOUT, follow_redirects=True, event_hooks={"request": [check]})


def _endpoint(environment: Mapping[str, str]) -> str:
    return (_read_variable(environment, "HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _host_and_port(url: httpx.URL) -> tuple[str, int]:
    return url.host, url.port or {"http": 80}.get(url.scheme, 443)


def _has_proxy(url: httpx.URL) -> bool:
    proxies = getproxies()
    return not {url.scheme, "all"}.isdisjoint(proxies) and not proxy_bypass(url.host)


def _hub_files(
    uri: str, place: SourceUri, client: httpx.Client, environment: Mapping[str, str]
) -> Sequence[RemoteFile]:
    """Return the adapter's files in the repository, all of one commit."""
    if len(place.parts) < 2:
        raise SourceRefused(uri, "must name a repository, as hf://owner/repository")
    endpoint = _endpoint(environment)
    repository, folder = "/".join(place.parts[:2]), "".join(f"{part}/" for part in place.parts[2:])
    revision = place.revision or "main"
    listed = _json(client, f"{endpoint}/api/models/{repository}/revision/{revision}", {"blobs": "true"})
    sizes = {item["rfilename"]: int(item.get("size") or 0) for item in listed["siblings"]}
    return [
        RemoteFile(
            name,
            hf_hub_url(repository, folder + name, revision=listed["sha"], endpoint=endpoint),
            {},
            sizes[folder + name],
        )
        for name in ADAPTER_FILES
        if folder + name in sizes
    ]


def _mlflow(uri: str, environment: Mapping[str, str]) -> httpx.Client:
    """Return a client of the MLflow server. It follows no redirect. Raises: SourceRefused."""
    address = _read_variable(environment, "MLFLOW_TRACKING_URI")
    if not address.startswith(("http://", "https://")):
        raise SourceRefused(uri, "needs an MLflow server: the operator sets MLFLOW_TRACKING_URI to its http(s) address")
    url = httpx.URL(address.rstrip("/"))
    token = _read_variable(environment, "MLFLOW_TRACKING_TOKEN")
    user = _read_variable(environment, "MLFLOW_TRACKING_USERNAME")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    auth = (url.username, url.password) if url.userinfo else None
    if user and not token:
        auth = user, _read_variable(environment, "MLFLOW_TRACKING_PASSWORD")
    return httpx.Client(base_url=url.copy_with(userinfo=b""), headers=headers, auth=auth, timeout=_TIMEOUT)


def _mlflow_files(
    uri: str, place: SourceUri, client: httpx.Client, environment: Mapping[str, str]
) -> Sequence[RemoteFile]:
    """Return the adapter's files among the artifacts of a run, or of a version of a registered model."""
    if not place.parts:
        raise SourceRefused(uri, "must name a run, as runs:/RUN/FOLDER, or a model, as models:/NAME/VERSION")
    if place.scheme == RUNS:
        return _run_files(client, place.parts[0], "/".join(place.parts[1:]))
    if not place.revision:
        raise SourceRefused(uri, "must name a version or an alias, as models:/NAME/3 or models:/NAME@champion")
    return _model_files(uri, client, place)


def _run_files(client: httpx.Client, run: str, folder: str) -> Sequence[RemoteFile]:
    listed = _json(client, f"{_API}/artifacts/list", {"run_id": run} | ({"path": folder} if folder else {}))
    sizes = {item["path"]: int(item.get("file_size") or 0) for item in listed.get("files", ()) if not item["is_dir"]}
    paths = {name: f"{folder}/{name}".lstrip("/") for name in ADAPTER_FILES}
    return [
        RemoteFile(name, "/get-artifact", {"run_uuid": run, "path": path}, sizes[path])
        for name, path in paths.items()
        if path in sizes
    ]


def _model_files(uri: str, client: httpx.Client, place: SourceUri) -> Sequence[RemoteFile]:
    """Return the files of a version, which MLflow serves as those of a run, or by their path in its own store."""
    name, version = place.parts[0], place.revision
    by_version = ("model-versions/get", {"name": name, "version": version})
    by_alias = ("registered-models/alias", {"name": name, "alias": version})
    route, params = by_version if version.isdecimal() else by_alias
    source = _json(client, f"{_API}/{route}", params)["model_version"]["source"]
    if source.startswith("models:/"):  # MLflow 3 gives a logged model an id of its own
        logged = _json(client, f"{_API}/logged-models/{source.removeprefix('models:/')}", {})
        source = logged["model"]["info"]["artifact_uri"]
    kind, _, path = "/".join((source.rstrip("/"), *place.parts[1:])).partition(":/")
    if kind == RUNS:
        run, _, folder = path.partition("/")
        return _run_files(client, run, folder)
    if kind != "mlflow-artifacts":
        raise SourceRefused(uri, "was registered from a place that the MLflow server itself does not serve")
    listed = _json(client, _ARTIFACTS, {"path": path})
    sizes = {item["path"].rpartition("/")[2]: item for item in listed.get("files", ()) if not item["is_dir"]}
    return [
        RemoteFile(file, f"{_ARTIFACTS}/{quote(path)}/{file}", {}, int(sizes[file].get("file_size") or 0))
        for file in ADAPTER_FILES
        if file in sizes
    ]


def _json(client: httpx.Client, url: str, params: Mapping[str, str]) -> JsonObject:
    """Return the JSON object at `url`. Raises: httpx.HTTPError; ValueError."""
    with client.stream("GET", url, params=params) as answer:
        answer.raise_for_status()
        data = bytearray()
        for chunk in answer.iter_bytes(CHUNK_BYTES):
            data += chunk
            if len(data) > _MAX_LIST_BYTES:
                raise ValueError(f"the server's list has more than {_MAX_LIST_BYTES} bytes")
    listed: JsonObject = json.loads(data)
    return listed
