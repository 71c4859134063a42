"""Read IP addresses, and decide which are this machine's own."""

from __future__ import annotations

import ipaddress


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address, None for a name. An IPv4 address that is mapped into IPv6 is returned as IPv4.

    A socket that listens on `::` reports IPv4 clients as mapped addresses, such as `::ffff:127.0.0.1`.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name, for example from a proxy, or a Unix socket
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def is_loopback_address(host: str) -> bool:
    """Return whether `host` is an address of this machine's loopback interface. A name is not."""
    address = parse_address(host)
    return address is not None and address.is_loopback


def is_loopback_host(host: str) -> bool:
    """Return whether `host` is `localhost` or an address of this machine's loopback interface."""
    return host == "localhost" or is_loopback_address(host)
