"""A sandbox's addresses on the command line: checked before anything is started."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

import click

_MAC: Final = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_GROUP_BIT: Final = 1
MTU_MIN: Final = 576
MTU_MAX: Final = 65_521
"""Source: virtio 1.2, 5.1.4, and what Linux accepts for virtio-net."""

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def address(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """--address: each with its prefix length."""
    return tuple(str(_interface(value, parameter)) for value in values)


def _interface(value: str, parameter: click.Parameter) -> Interface:
    if "/" not in value:
        raise click.BadParameter(f"{value} has no prefix length: write 10.9.0.50/24", param=parameter)
    try:
        return ipaddress.ip_interface(value)
    except ValueError:
        raise click.BadParameter(
            f"{value} is not an address with prefix length: write 10.9.0.50/24", param=parameter
        ) from None


def mac(_context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """--mac: one card's own address, not a group's."""
    if value is None:
        return ""
    lowered = value.lower()
    if not _MAC.fullmatch(lowered):
        raise click.BadParameter(f"{value} is not a MAC address: write 52:54:00:5a:00:50", param=parameter)
    if int(lowered[:2], 16) & _GROUP_BIT:
        raise click.BadParameter(
            f"{value} is a group address: its first byte must be even, as in 52:54:00:5a:00:50",
            param=parameter,
        )
    return lowered


def check_gateway(gateway: str, addresses: tuple[str, ...]) -> str:
    """The gateway, which must be reachable from one of the addresses. Raises click.UsageError naming both."""
    if not gateway:
        return ""
    try:
        wanted = ipaddress.ip_address(gateway)
    except ValueError:
        raise click.BadParameter(
            f"{gateway} is not an address: write 10.9.0.1", param_hint="--gateway"
        ) from None
    if not addresses:
        raise click.UsageError("--gateway needs --address: without an address the sandbox has no network")
    if not any(wanted in ipaddress.ip_interface(own).network for own in addresses):
        raise click.BadParameter(
            f"{gateway} is in the network of none of {', '.join(addresses)}: correct --gateway or the prefix length",
            param_hint="--gateway",
        )
    return str(wanted)
