"""Sources of a model hub and of MLflow, read from servers on loopback."""

from __future__ import annotations

import base64
import traceback
from pathlib import Path

import httpx
import pytest

from deployments.cli.client import free_port
from deployments.config.source_prefixes import SourceUri
from deployments.errors import DeploymentsError, SourceMissing, SourceRefused, SourceUnavailable
from deployments.publishing.http_sources import copy_over_http
from deployments.publishing.ssrf_guard import Resolve, resolve_by_system
from lora_store import AdapterRefused
from tests.deployments.publishing.local_hub import COMMIT, LocalHub, local_hub
from tests.deployments.scripted import scripted

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 100, "lora_samples.jsonl": b"s"}
OTHER = {"optimizer.pt": b"o" * 5000, "README.md": b"r"}
MAX_BYTES = 1000


def inside(folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in (FILES | OTHER).items()}


def copied(
    hub: LocalHub,
    uri: str,
    work: Path,
    max_bytes: int = MAX_BYTES,
    resolve: Resolve = resolve_by_system,
    **more: str,
) -> dict[str, bytes]:
    work.mkdir()
    environment = hub.environment | more
    copy_over_http(uri, SourceUri.parse(uri), work, max_bytes, lambda _: None, environment, resolve=resolve)
    return {path.name: path.read_bytes() for path in work.iterdir()}


@pytest.mark.parametrize(
    "uri",
    [
        "hf://acme/sql",
        "hf://acme/sql@v2",
        "hf://acme/many/a b/checkpoint-20",
        "runs:/r1",
        "runs:/r1/model/peft",
        "models:/sql/3",
        "models:/sql@champion",
        "models:/sql@champion/peft",
        "models:/sql/4",
        "models:/sql/5",
        "models:/sql/5/peft",
    ],
)
def test_an_adapters_files_are_copied_and_no_others(tmp_path: Path, uri: str) -> None:
    flat = FILES | OTHER
    with local_hub(
        repositories={
            "acme/sql@main": flat,
            "acme/sql@v2": flat,
            "acme/many@main": inside("a b/checkpoint-20"),
        },
        runs={"r1": flat | inside("model/peft") | inside("model")},
        artifacts={"0/m-1/artifacts": flat, "0/m-1/artifacts/peft": flat},
        models={"sql/3": "runs:/r1/model", "sql/4": "mlflow-artifacts:/0/m-1/artifacts", "sql/5": "models:/m-1"},
        logged={"m-1": "mlflow-artifacts:/0/m-1/artifacts"},
        aliases={"sql@champion": "3"},
    ) as hub:
        assert copied(hub, uri, tmp_path / "work") == FILES


def test_all_files_of_a_repository_are_of_the_commit_that_was_listed(tmp_path: Path) -> None:
    with local_hub(repositories={"acme/sql@main": FILES}) as hub:
        copied(hub, "hf://acme/sql", tmp_path / "work")
    assert [path for path in hub.asked if "/resolve/" in path] == [
        f"/acme/sql/resolve/{COMMIT}/{name}" for name in FILES
    ]


@pytest.mark.parametrize("uri", ["hf://acme/sql", "runs:/r1", "models:/sql/3"])
def test_the_size_of_a_copy_is_bounded_whatever_the_server_announces(tmp_path: Path, uri: str) -> None:
    models = {"sql/3": "mlflow-artifacts:/m"}
    known = {"repositories": {"acme/sql@main": FILES}, "runs": {"r1": FILES}, "artifacts": {"m": FILES}}
    with local_hub(**known, models=models) as hub:
        size = sum(map(len, FILES.values()))
        assert copied(hub, uri, tmp_path / "enough", size) == FILES
        with pytest.raises(AdapterRefused, match=f"more than {size - 1} bytes"):
            copied(hub, uri, tmp_path / "less", size - 1)


def test_room_is_taken_before_the_copy(tmp_path: Path) -> None:
    taken: list[int] = []
    with local_hub(repositories={"acme/sql@main": FILES}) as hub:
        place = SourceUri.parse("hf://acme/sql")
        copy_over_http("hf://acme/sql", place, tmp_path, MAX_BYTES, taken.append, hub.environment)
    assert taken == [sum(map(len, FILES.values()))]


def test_the_token_goes_to_the_hub_and_not_to_its_file_servers(tmp_path: Path) -> None:
    with local_hub(repositories={"acme/sql@main": FILES}, token="secret") as hub:
        assert copied(hub, "hf://acme/sql", tmp_path / "with", HF_TOKEN="secret") == FILES
        assert hub.seen_tokens == [""] * len(FILES)
        with pytest.raises(SourceRefused, match="cannot be read with this server's credentials"):
            copied(hub, "hf://acme/sql", tmp_path / "without")


def test_mlflow_gets_its_token(tmp_path: Path) -> None:
    with local_hub(runs={"r1": FILES}, token="secret") as hub:
        assert copied(hub, "runs:/r1", tmp_path / "with", MLFLOW_TRACKING_TOKEN="secret") == FILES
        with pytest.raises(SourceRefused, match="credentials"):
            copied(hub, "runs:/r1", tmp_path / "without", MLFLOW_TRACKING_USERNAME="me")


@pytest.mark.parametrize(("uri", "variable"), [("hf://acme/sql", "HF_TOKEN"), ("runs:/r1", "MLFLOW_TRACKING_TOKEN")])
def test_a_token_is_sent_without_the_space_around_it(tmp_path: Path, uri: str, variable: str) -> None:
    """A token from a file often ends with a line feed, which no header can carry."""
    with local_hub(repositories={"acme/sql@main": FILES}, runs={"r1": FILES}, token="secret") as hub:
        assert copied(hub, uri, tmp_path / "work", **{variable: " secret\n"}) == FILES


@pytest.mark.parametrize("in_address", [True, False])
def test_mlflow_gets_the_user_and_password_of_its_address_or_variables(tmp_path: Path, in_address: bool) -> None:
    with scripted((404, {})) as server, pytest.raises(SourceMissing):
        given = {"MLFLOW_TRACKING_URI": server.url.replace("//", "//a%40b:c%2Fd@")}
        if not in_address:
            given = {"MLFLOW_TRACKING_USERNAME": "a@b\n", "MLFLOW_TRACKING_PASSWORD": "c/d\n"}
        copied(LocalHub(url=server.url), "runs:/r1", tmp_path / "work", **given)
    assert server.authorizations == [f"Basic {base64.b64encode(b'a@b:c/d').decode()}"]


@pytest.mark.parametrize("status", [401, 404, 502])
@pytest.mark.parametrize(
    ("uri", "variable", "value"),
    [
        ("hf://acme/sql", "HF_TOKEN", "pa55\nword"),
        ("hf://acme/sql", "HF_ENDPOINT", "http://me:pa55word@{host}"),
        ("hf://acme/sql", "HF_ENDPOINT", "http://me:pa55/word@{host}"),
        ("runs:/r1", "MLFLOW_TRACKING_TOKEN", "pa55\nword"),
        ("runs:/r1", "MLFLOW_TRACKING_TOKEN", "pa55wörd"),
        ("runs:/r1", "MLFLOW_TRACKING_URI", "http://me:pa55word@{host}"),
        ("runs:/r1", "MLFLOW_TRACKING_URI", "http://me:pa55/word@{host}"),
    ],
)
def test_no_error_quotes_a_credential(tmp_path: Path, uri: str, variable: str, value: str, status: int) -> None:
    with scripted((status, {})) as server, pytest.raises(DeploymentsError) as caught:
        given = {variable: value.format(host=server.url.removeprefix("http://"))}
        copied(LocalHub(url=server.url), uri, tmp_path / "work", **given)
    logged = "".join(traceback.format_exception(caught.value))
    assert uri in logged and "pa55" not in logged and "wörd" not in logged


def test_the_log_names_the_host_and_status_of_a_server_that_fails(tmp_path: Path) -> None:
    with scripted((502, {})) as server, pytest.raises(SourceUnavailable) as caught:
        copied(LocalHub(url=server.url), "runs:/r1", tmp_path / "work")
    assert str(caught.value) == "the source 'runs:/r1' cannot be read: 127.0.0.1 answered 502 Bad Gateway"


@pytest.mark.parametrize(
    "uri",
    [
        "hf://acme/none",
        "hf://acme/sql@gone",
        "hf://acme/sql/empty",
        "runs:/r2",
        "runs:/r1/none",
        "models:/sql/3",
        "models:/sql/4",
        "models:/sql@gone",
    ],
)
def test_a_missing_adapter_is_reported(tmp_path: Path, uri: str) -> None:
    known = {"repositories": {"acme/sql@main": FILES}, "runs": {"r1": FILES}, "models": {"sql/3": "runs:/r2"}}
    with local_hub(**known) as hub, pytest.raises(SourceMissing) as caught:
        copied(hub, uri, tmp_path / "work")
    assert caught.value.place == uri


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf://acme", "must name a repository"),
        ("runs:/", "must name a run"),
        ("models:/sql", "must name a version or an alias"),
    ],
)
def test_a_uri_that_names_no_adapter_is_refused(tmp_path: Path, uri: str, says: str) -> None:
    with local_hub() as hub, pytest.raises(SourceRefused, match=says):
        copied(hub, uri, tmp_path / "work")
    assert hub.asked == []


def test_mlflow_must_be_a_server(tmp_path: Path) -> None:
    """A tracking folder would be read from this machine's disk."""
    place = SourceUri.parse("runs:/r1")
    for address in ({}, {"MLFLOW_TRACKING_URI": f"file://{tmp_path}"}):
        with pytest.raises(SourceRefused, match="MLFLOW_TRACKING_URI"):
            copy_over_http("runs:/r1", place, tmp_path, MAX_BYTES, lambda _: None, address)


@pytest.mark.parametrize("uri", ["hf://acme/sql", "runs:/r1", "models:/sql/3"])
def test_an_unreachable_server_is_reported(tmp_path: Path, uri: str) -> None:
    hub = LocalHub(url=f"http://127.0.0.1:{free_port('127.0.0.1')}")
    with pytest.raises(SourceUnavailable) as caught:
        copied(hub, uri, tmp_path / "work")
    assert uri in str(caught.value)


@pytest.mark.parametrize("source", ["file:///etc", "/etc", "s3://bucket/key", "http://127.0.0.1/x", "dbfs:/x"])
def test_a_version_from_elsewhere_is_not_opened_by_this_server(tmp_path: Path, source: str) -> None:
    with local_hub(models={"sql/3": source}) as hub, pytest.raises(SourceRefused, match="does not serve"):
        copied(hub, "models:/sql/3", tmp_path / "work")
    assert len(hub.asked) == 1


def addresses(**by_host: str) -> Resolve:
    """Resolve these names, with `_` for a dot; loopback stays what it is."""
    known = {name.replace("_", "."): address for name, address in by_host.items()}
    return lambda host, port: [known.get(host, "127.0.0.1")]


@pytest.mark.parametrize("address", ["169.254.169.254", "10.1.2.3", "127.0.0.1", "::1"])
def test_a_public_hubs_redirect_to_an_internal_address_is_not_followed(tmp_path: Path, address: str) -> None:
    with local_hub(repositories={"acme/sql@main": FILES}) as hub:
        port = httpx.URL(hub.url).port
        hub.file_server = f"http://files.example:{port}"
        resolve = {"127.0.0.1": "93.184.216.34", "files.example": address}
        with pytest.raises(SourceRefused, match="leads to an address that this server does not read from"):
            copied(hub, "hf://acme/sql", tmp_path / "work", resolve=lambda host, port: [resolve[host]])
    assert not hub.seen_tokens, "nothing was sent there"


def test_a_redirect_over_http_goes_to_the_address_that_was_checked(tmp_path: Path) -> None:
    """the name itself does not resolve here, and could resolve to another address the second time"""
    with local_hub(repositories={"acme/sql@main": FILES}) as hub:
        hub.file_server = f"http://files.example:{httpx.URL(hub.url).port}"
        assert copied(hub, "hf://acme/sql", tmp_path / "work", resolve=addresses(files_example="127.0.0.1")) == FILES
    assert len(hub.seen_tokens) == len(FILES)


def test_each_hop_of_a_redirect_is_checked(tmp_path: Path) -> None:
    with local_hub(repositories={"acme/sql@main": FILES}) as inner, local_hub() as outer:
        outer.repositories, outer.file_server = inner.repositories, f"{inner.url}/acme/sql/resolve/{COMMIT}/x?"
        inner.file_server = "http://metadata.example"
        with pytest.raises(SourceRefused):
            copied(outer, "hf://acme/sql", tmp_path / "work", resolve=addresses(metadata_example="169.254.169.254"))
    assert any("/resolve/" in path for path in inner.asked), "the first hop was followed"


def test_a_proxy_of_the_environment_resolves_redirects_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise OSError("no names here")

    with local_hub(repositories={"acme/sql@main": FILES}) as hub:
        hub.file_server = f"http://files.example:{httpx.URL(hub.url).port}"
        monkeypatch.setenv("http_proxy", hub.url)  # which answers for the name
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert copied(hub, "hf://acme/sql", tmp_path / "work", resolve=resolve) == FILES
    assert any(path.startswith("http://files.example") for path in hub.asked)
