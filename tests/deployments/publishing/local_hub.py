"""A model hub and an MLflow server on loopback, with the routes that sources are read by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = Mapping[str, bytes]  # by path


@dataclass
class LocalHub:
    """Serves repositories as the hub does, runs and registered models as MLflow does. Requests need `token` if set."""

    repositories: dict[str, Files] = field(default_factory=dict)  # by `owner/repository@revision`
    runs: dict[str, Files] = field(default_factory=dict)
    artifacts: dict[str, Files] = field(default_factory=dict)  # of MLflow's own store, by folder
    models: dict[str, str] = field(default_factory=dict)  # `name/version` to the source that was registered
    logged: dict[str, str] = field(default_factory=dict)  # id of a logged model to its artifact URI
    aliases: dict[str, str] = field(default_factory=dict)  # `name@alias` to version
    token: str = ""
    url: str = ""
    asked: list[str] = field(default_factory=list)
    seen_tokens: list[str] = field(default_factory=list)  # of downloads from the file server
    file_server: str = ""  # where downloads are redirected to; "": another name of this machine

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "MLFLOW_TRACKING_URI": self.url}


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def do_GET(self) -> None:
        hub, place = self.hub, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(place.query).items()}
        hub.asked.append(self.path)
        sent = self.headers.get("authorization", "")
        if place.path.startswith("/files/"):
            hub.seen_tokens.append(sent)
        elif hub.token and sent != f"Bearer {hub.token}":
            self._answer(401, b"{}")
            return
        parts = [unquote(part) for part in place.path.strip("/").split("/")]
        match parts:
            case ["api", "models", owner, name, "revision", revision]:
                self._list(hub.repositories.get(f"{owner}/{name}@{revision}"))
            case [owner, name, "resolve", commit, *path]:
                assert commit == COMMIT
                self.send_response(302)
                server = hub.file_server or self._other_host()
                self.send_header("Location", f"{server}/files/{owner}/{name}/{'/'.join(path)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case ["files", owner, name, *path]:
                found = next(files for key, files in hub.repositories.items() if key.startswith(f"{owner}/{name}@"))
                self._answer(200, found["/".join(path)])
            case ["api", "2.0", "mlflow", "artifacts", "list"]:
                self._artifacts(hub.runs.get(query["run_id"]), query.get("path", ""))
            case ["api", "2.0", "mlflow", "registered-models", "alias"]:
                version = hub.aliases.get(f"{query['name']}@{query['alias']}", "none")
                self._version(f"{query['name']}/{version}", 400)
            case ["api", "2.0", "mlflow", "model-versions", "get"]:
                self._version(f"{query['name']}/{query['version']}", 404)
            case ["api", "2.0", "mlflow", "logged-models", model]:
                body = {"model": {"info": {"model_id": model, "artifact_uri": hub.logged[model]}}}
                self._answer(200, json.dumps(body).encode())
            case ["api", "2.0", "mlflow-artifacts", "artifacts"]:
                self._artifacts(hub.artifacts.get(query["path"], {}), "")
            case ["api", "2.0", "mlflow-artifacts", "artifacts", *folder, name]:
                self._download(hub.artifacts.get("/".join(folder)), name)
            case ["get-artifact"]:
                self._download(hub.runs.get(query["run_uuid"]), query["path"])
            case _:
                self._answer(404, b"{}")

    def _other_host(self) -> str:
        """Return another name of this machine, as the hub's file servers have."""
        return f"http://localhost:{self.server.server_address[1]}"

    def _list(self, files: Files | None) -> None:
        listed = [{"rfilename": path, "size": len(data)} for path, data in (files or {}).items()]
        self._answer(404 if files is None else 200, json.dumps({"sha": COMMIT, "siblings": listed}).encode())

    def _artifacts(self, files: Files | None, folder: str) -> None:
        below = {path: data for path, data in (files or {}).items() if path.rpartition("/")[0] == folder}
        listed = [{"path": path, "is_dir": False, "file_size": len(data)} for path, data in below.items()]
        listed += [{"path": "other", "is_dir": True}]
        self._answer(404 if files is None else 200, json.dumps({"root_uri": "x", "files": listed}).encode())

    def _version(self, key: str, missing: int) -> None:
        body = {"model_version": {"name": key, "source": self.hub.models.get(key)}}
        self._answer(200 if key in self.hub.models else missing, json.dumps(body).encode())

    def _download(self, files: Files | None, path: str) -> None:
        data = (files or {}).get(path)
        self._answer(404 if data is None else 200, data or b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""


@contextmanager
def local_hub(**state: object) -> Iterator[LocalHub]:
    """Run a hub with this state."""
    hub = LocalHub(**state)  # type: ignore[arg-type]
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        hub.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            http.shutdown()
            thread.join()
