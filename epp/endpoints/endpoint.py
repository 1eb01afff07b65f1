"""What an endpoint is: its name, its address, and what discovery says of it."""

from __future__ import annotations

import ipaddress

import msgspec


class Endpoint(msgspec.Struct, frozen=True):
    """One rank of one model server."""

    name: str
    """"<namespace>/<pod>-rank-<i>", unique in the pool."""
    address: str
    """"ip:port" as Envoy spells it: IPv6 in its shortest form and in brackets."""
    labels: dict[str, str] = {}
    metrics_address: str = ""
    """"host:port" to scrape; empty: `address`."""
    node: str = ""
    """Name of the machine that it runs on; empty: discovery does not tell."""
    node_address: str = ""
    """That machine's address, as the host in `address`; empty: likewise."""


def address_text(host: str, port: int) -> str:
    """ "ip:port" as Envoy spells it, so that names match: shortest IPv6 form, in brackets.

    Raises:
        ValueError: host is not an IP address, or port not in 1..65535.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not in 1..65535")
    return f"{host_text(host)}:{port}"


def host_text(host: str) -> str:
    """The host part of `address_text`: an IPv4 address as it is, IPv6 in its shortest form and in brackets.

    Raises:
        ValueError: host is not an IP address.
    """
    ip = ipaddress.ip_address(host)
    if ip.version == 4:
        return str(ip)
    mapped = ip.ipv4_mapped  # inet_ntop writes these with dots, ipaddress only since Python 3.13
    return f"[::ffff:{mapped}]" if mapped is not None else f"[{ip.compressed}]"
