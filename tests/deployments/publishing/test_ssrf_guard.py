from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deployments.errors import SourceRefused, SourceUnavailable
from deployments.publishing import ssrf_guard
from deployments.publishing.ssrf_guard import pin_public_address, pin_redirect
from lora_store.location import Location

PUBLIC = "93.184.216.34"
CLOUD = "s3://bucket/pool?region=eu-west-1"
HTTP = "s3://bucket/pool?endpoint_override=minio.pool:9000&scheme=http"
HTTPS = "s3://bucket/pool?endpoint_override=minio.pool:9000"
INNER = ["10.1.2.3", "192.168.0.9", "172.16.0.1", "fd12::1"]
NEVER = [
    "127.0.0.1",
    "127.9.9.9",
    "::1",
    "0.0.0.0",
    "::",
    "169.254.169.254",
    "fe80::1",
    "fe80::1%eth0",
    "fd00:ec2::254",
    "100.100.100.200",
    "224.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "255.255.255.255",
    "168.63.129.16",
    "::ffff:168.63.129.16",
    "64:ff9b::a83f:8110",
    "192.0.0.192",
    "fec0::1",
    "feff:ffff::1",
    "2001:0:a9fe:a9fe::1",
    "2001::1",
]


def resolving(*addresses: str) -> tuple[Callable[[str, int], Sequence[str]], list[tuple[str, int]]]:
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return addresses

    return resolve, asked


def check(text: str, *addresses: str) -> Location:
    return pin_public_address("s3://bucket/pool/poet", Location(text), resolving(*addresses)[0])


@pytest.mark.parametrize("address", [*NEVER, *INNER])
@pytest.mark.parametrize("text", [CLOUD, "gs://bucket/pool"])
def test_a_cloud_host_must_have_public_addresses(text: str, address: str) -> None:
    assert check(text, PUBLIC) == Location(text)
    with pytest.raises(SourceRefused, match="leads to an address"):
        check(text, address)
    with pytest.raises(SourceRefused):
        check(text, PUBLIC, address)


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("text", [HTTP, HTTPS])
def test_a_host_in_the_prefix_must_not_have_loopback_or_metadata_addresses(text: str, address: str) -> None:
    with pytest.raises(SourceRefused, match="leads to an address"):
        check(text, address)
    with pytest.raises(SourceRefused):
        check(text, PUBLIC, address)


@pytest.mark.parametrize("address", [PUBLIC, *INNER])
def test_a_host_in_the_prefix_may_be_private_and_is_pinned_over_http(
    address: str,
) -> None:
    assert check(HTTPS, address) == Location(HTTPS), "its certificate names it"
    endpoint = check(HTTP, address, "10.9.9.9").endpoint
    assert endpoint is not None
    assert (endpoint.host, endpoint.port, endpoint.scheme) == (address, 9000, "http")


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "[::1]:9000", "169.254.169.254", "localhost:9000", "LOCALHOST"])
def test_an_address_in_the_prefix_is_the_operators_choice(host: str) -> None:
    resolve, asked = resolving()
    location = Location(f"s3://bucket/pool?endpoint_override={host}&scheme=http")
    assert pin_public_address("s3://bucket/pool/x", location, resolve) is location
    assert not asked


@pytest.mark.parametrize("host", ["0x7f.1", "2130706433", "127.1"])
def test_another_spelling_of_an_address_counts_as_a_name(host: str) -> None:
    with pytest.raises(SourceRefused):
        check(f"s3://bucket/pool?endpoint_override={host}:9000&scheme=http", "127.0.0.1")


def test_the_requested_host_is_the_checked_one() -> None:
    for text, expected in [
        (CLOUD, ("s3.eu-west-1.amazonaws.com", 443)),
        ("s3://bucket/pool", ("s3.us-east-1.amazonaws.com", 443)),
        ("gs://bucket/pool", ("storage.googleapis.com", 443)),
        (HTTP, ("minio.pool", 9000)),
        ("s3://bucket?endpoint_override=minio.pool&scheme=http", ("minio.pool", 80)),
    ]:
        resolve, asked = resolving(PUBLIC)
        pin_public_address("s3://bucket/x", Location(text), resolve)
        assert asked == [expected]


def test_a_folder_has_no_address(tmp_path: Path) -> None:
    resolve, asked = resolving()
    assert pin_public_address("file:///x", Location(str(tmp_path)), resolve) == Location(str(tmp_path))
    assert not asked


def test_a_host_without_an_address_is_an_unavailable_source() -> None:
    def failing(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(SourceUnavailable, match=r"minio\.pool"):
        pin_public_address("s3://bucket/pool/poet", Location(HTTP), failing)
    with pytest.raises(SourceUnavailable):
        check(HTTP)


def test_the_system_resolves_names() -> None:
    assert "127.0.0.1" in ssrf_guard.resolve_by_system("127.0.0.1", 80)


HUB, FILES = ("hub.example", 443), ("files.example", 443)


def redirect(own: str, *found: str) -> str:
    known = {HUB[0]: [own], FILES[0]: list(found)}
    return pin_redirect("hf://acme/sql", HUB, FILES, lambda host, port: known[host])


@pytest.mark.parametrize(
    ("own", "target"),
    [(PUBLIC, PUBLIC), (INNER[0], PUBLIC), *((INNER[0], inner) for inner in INNER), ("127.0.0.1", "::1")],
)
def test_a_redirect_may_lead_to_networks_like_the_servers_own(own: str, target: str) -> None:
    assert redirect(own, target) == target


@pytest.mark.parametrize(
    ("own", "target"),
    [
        *((PUBLIC, inner) for inner in INNER + NEVER),
        *((INNER[0], never) for never in NEVER),
        ("::1", "169.254.169.254"),
    ],
)
def test_a_redirect_to_a_more_internal_address_is_refused(own: str, target: str) -> None:
    with pytest.raises(SourceRefused):
        redirect(own, PUBLIC, target)


def test_a_redirect_to_a_host_without_address_is_unavailable() -> None:
    with pytest.raises(SourceUnavailable, match=r"files\.example has no address"):
        redirect(PUBLIC)
