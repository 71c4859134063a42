"""Check the addresses of a source's host, so that no name leads the server to itself or into its own network."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address

from deployments.errors import SourceRefused, SourceUnavailable
from lora_store.location import Location

logger = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_TEREDO = ipaddress.ip_network("2001::/32")  # each address names a server and a client behind it, so it is not a store
_SITE_LOCAL = ipaddress.ip_network("fec0::/10")  # deprecated by RFC 3879; Python counts them as private
# Cloud metadata services, which return credentials, at addresses that are neither link-local nor reserved.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "fd00:ec2::254",  # AWS
            "168.63.129.16",  # Azure, a public address
            "192.0.0.192",  # Oracle Cloud
            "100.100.100.200",  # Alibaba Cloud
        ),
    )
)
Resolve = Callable[[str, int], Sequence[str]]


def resolve_by_system(host: str, port: int) -> Sequence[str]:
    """Return the host's addresses. Raises: OSError."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def pin_public_address(uri: str, location: Location, resolve: Resolve = resolve_by_system) -> Location:
    """Return a location that can be read safely while its host has the addresses that it has now.

    An IP address or `localhost` in the prefix is the operator's choice. A name in the prefix may have private
    addresses, but neither loopback nor link-local ones, where clouds have their metadata services. A host that the
    prefix does not name must have public addresses.
    Over http the checked address replaces the name, so that it cannot change. Over https pyarrow resolves the name
    again: an attacker who changes it meanwhile does not have its certificate, so no request is sent there.
    Raises: SourceRefused, SourceUnavailable.
    """
    endpoint = location.endpoint
    if endpoint is None or (endpoint.is_named and _is_own_choice(endpoint.host)):
        return location
    addresses = _resolved(uri, endpoint.host, endpoint.port, resolve)
    for address in addresses:
        if not _is_allowed(_plain(address), private_too=endpoint.is_named):
            raise _refused(uri, endpoint.host, address)
    can_be_pinned = endpoint.is_named and endpoint.scheme == "http"
    return location.at_address(str(addresses[0])) if can_be_pinned else location


def pin_redirect(
    uri: str, server: tuple[str, int], target: tuple[str, int], resolve: Resolve = resolve_by_system
) -> str:
    """Return a checked address of the host and port to which this server redirects.

    The operator chose the server, so a redirect may lead to networks like the server's own: from a server with private
    addresses to private ones, from one on loopback to loopback, otherwise to public addresses only.
    Raises: SourceRefused, SourceUnavailable.
    """
    own = [_plain(address) for address in _resolved(uri, *server, resolve)]
    private_too, loopback_too = not all(each.is_global for each in own), any(each.is_loopback for each in own)
    addresses = _resolved(uri, *target, resolve)
    for address in addresses:
        plain = _plain(address)
        if not (_is_allowed(plain, private_too=private_too) or (loopback_too and plain.is_loopback)):
            raise _refused(uri, target[0], address)
    return str(min(addresses, key=lambda address: address.version))


def _resolved(uri: str, host: str, port: int, resolve: Resolve) -> Sequence[Address]:
    """Return the host's addresses, at least one. Raises: SourceUnavailable."""
    try:
        addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in resolve(host, port)]
    except OSError as exc:
        raise SourceUnavailable(uri, f"the address of {host} cannot be resolved: {exc}") from exc
    if not addresses:
        raise SourceUnavailable(uri, f"{host} has no address")
    return addresses


def _refused(uri: str, host: str, address: Address) -> SourceRefused:
    logger.warning("the source %s leads to the address %s of the host %s", uri, address, host)
    return SourceRefused(uri, "leads to an address that this server does not read from")


def _is_own_choice(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
    return True


def _is_allowed(address: Address, *, private_too: bool) -> bool:
    if address.is_multicast or address.is_loopback or address.is_link_local or address.is_unspecified:
        return False
    if address.is_reserved or address in _METADATA or address in _TEREDO or address in _SITE_LOCAL:
        return False
    return address.is_global or (private_too and address.is_private)


def _plain(address: Address) -> Address:
    """Return the IPv4 address inside an IPv6 address if there is one, otherwise the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
