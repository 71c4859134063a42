"""Host names and pages that a server answers. DNS rebinding gives a page any name, but never an address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.cli.local_server import Server
from deployments.config.app import AppConfig
from tests.deployments.all_routes import example_path, mounted
from tests.deployments.app_fakes import config_of, http_of, serve_plainly
from tests.deployments.asking import asked, error_of, request
from tests.deployments.key_files import bearer, entry, write
from tests.docs.pages import ROOT

OWN = [
    "localhost",
    "LocalHost:8000",
    "localhost.",
    "localhost.:8000",
    "127.0.0.1:8000",
    "127.8.8.8",
    "[::1]",
    "[::1]:80",
]
OTHER = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.localhost",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "user@127.0.0.1",
    "127.0.0.1/",
    "127.0.0.1:8000:1",
    "localhost:",
    "localhost:b",
    ".",
    "127.0.0.1 evil.example",
    "[::1",
    "::1",
    "[evil.example]",
    "",
]


def status(host: str, origin: str | None = None, path: str = "/v1/models", **options: Any) -> httpx.Response:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    return request("GET", path, sent={"headers": headers}, **{"allowed_hosts": (), **options})


@pytest.mark.parametrize("host", [*OWN, "192.0.2.7:8000", "[2001:db8::1]:8000"])
def test_a_loopback_name_and_any_address_is_answered(host: str) -> None:
    assert status(host).status_code == 200


@pytest.mark.parametrize("host", OTHER)
def test_another_name_is_refused_with_an_api_error(host: str) -> None:
    response = status(host)
    assert (response.status_code, error_of(response)["code"]) == (421, "permission_denied")
    assert "allowed_hosts" in error_of(response)["message"]
    assert status(host, path="/health").status_code == 421


@pytest.mark.parametrize("host", ["pool.example", "POOL.example:443", "pool.example."])
def test_the_setting_adds_names(host: str) -> None:
    assert status(host, allowed_hosts=("Pool.Example.",)).status_code == 200
    assert status(f"x{host}", allowed_hosts=("pool.example",)).status_code == 421


async def sent(method: str, path: str, *headers: tuple[str, str], **options: Any) -> httpx.Response:
    """Return the response to a request with exactly these Host and Origin headers."""
    async with asked(**{"allowed_hosts": (), **options}) as (client, _):
        made = client.build_request(method, path)
        del made.headers["host"]
        made.headers = httpx.Headers([*made.headers.multi_items(), *headers])
        return await client.send(made)


async def test_no_host_and_two_hosts_are_refused() -> None:
    assert (await sent("GET", "/v1/models")).status_code == 421
    assert (await sent("GET", "/v1/models", ("host", "localhost"), ("host", "evil.example"))).status_code == 421
    assert (await sent("GET", "/v1/models", ("host", "localhost"))).status_code == 200


async def test_every_route_refuses_a_foreign_name_and_a_foreign_page() -> None:
    num_asked = 0
    async with http_of(serve_plainly(allowed_hosts=())) as client:
        for method, path in mounted():
            asked = example_path(path)
            refused = await client.request(method, asked, headers={"host": "evil.example"})
            assert refused.status_code == 421, (method, path)
            headers = {"host": "127.0.0.1:8000", "origin": "http://evil.example:8000"}
            refused = await client.request(method, asked, headers=headers)
            assert refused.status_code == 403, (method, path)
            if method != "HEAD":
                assert error_of(refused)["code"] == "permission_denied"
            num_asked += 1
    assert num_asked == len(mounted()) >= 30


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://10.1.2.3:8000", 200),
        ("http://127.0.0.1:3000", 200),
        ("http://localhost:3000", 200),
        ("http://[::1]:3000", 200),
        ("http://[::ffff:7f00:1]:3000", 200),
        ("http://[::ffff:a01:204]:8000", 403),
        ("https://pool.example", 200),
        ("http://10.1.2.4:8000", 403),
        ("https://evil.example", 403),
        ("https://localhost.evil.example", 403),
        ("https://user@127.0.0.1.evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[evil", 403),
    ],
)
def test_only_pages_of_the_server_or_this_machine_may_send_requests(origin: str, expected: int) -> None:
    assert status("10.1.2.3:8000", origin, allowed_hosts=("pool.example",)).status_code == expected


def test_with_keys_any_name_is_answered_unless_the_setting_lists_some(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k"))
    options: dict[str, Any] = {"keys_file": keys, "headers": bearer("k")}
    for host in ("serve-svc.pool.svc:8000", "10.4.5.6:8000"):
        assert status(host, "https://console.example", **options).status_code == 200
    assert status("other.example", **options, allowed_hosts=("pool.example",)).status_code == 421
    assert (
        status("pool.example", "https://console.example", **options, allowed_hosts=("pool.example",)).status_code == 200
    )
    assert status("10.4.5.6", path="/ready", **options, allowed_hosts=("pool.example",)).status_code == 200


@pytest.mark.parametrize("name", ["http://a", "a:80", "*", "*.a", "", "a/b", "[::1]"])
def test_an_invalid_host_name_in_the_setting_stops_the_start(name: str) -> None:
    with pytest.raises(ValueError, match="must be a host name without scheme"):
        AppConfig(allowed_hosts=(name,))


def test_the_name_that_the_server_listens_on_is_allowed(tmp_path: Path) -> None:
    assert Server(config_of(allowed_hosts=()), host="Box.lan", port=1).settings.allowed_hosts == ("box.lan",)
    keys = write(tmp_path / "keys.json", entry("k"))
    assert Server(config_of(allowed_hosts=(), keys_file=keys), host="box.lan", port=1).settings.allowed_hosts == ()


PAGE = "https://chat.example"


def test_a_listed_page_may_ask_and_read_the_answer() -> None:
    response = status("localhost", PAGE, cors_origins=(PAGE,))
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    readable = set(response.headers["access-control-expose-headers"].split(", "))
    page = (ROOT / "docs" / "reference" / "http-api.md").read_text(encoding="utf-8")
    named = set(re.findall("`(x-[a-z-]+[a-z])(?:: false)?`", page.partition("## What an answer adds")[2]))
    assert len(named) >= 8 and named | {"retry-after", "x-ignored-fields"} <= readable


@pytest.mark.parametrize("origins", [(), ("https://other.example",), ("*",)])
def test_a_page_that_is_not_listed_is_refused_and_a_star_lists_every_page(origins: tuple[str, ...]) -> None:
    response = status("localhost", PAGE, cors_origins=origins)
    assert response.headers.get("access-control-allow-origin") == ("*" if origins == ("*",) else None)
    assert origins == ("*",) or (response.status_code, error_of(response)["code"]) == (403, "permission_denied")


def test_a_preflight_of_a_listed_page_needs_no_key(tmp_path: Path) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    options: dict[str, Any] = {"cors_origins": (PAGE,), "api_key": "secret-key"}
    preflight = request("OPTIONS", "/v1/chat/completions", sent={"headers": asked}, **options)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    refused = request("GET", "/v1/models", sent={"headers": {"origin": PAGE}}, **options)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_a_listed_page_may_not_publish_without_a_key() -> None:
    sent = {"headers": {"origin": PAGE, "host": "localhost"}}
    response = request("DELETE", "/v1/loras/poet", sent=sent, cors_origins=(PAGE,))
    assert (response.status_code, error_of(response)["code"]) == (403, "permission_denied")


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "https://*.example", ""])
def test_an_origin_in_the_settings_is_scheme_and_host(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        config_of(cors_origins=(origin,))
