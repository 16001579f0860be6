"""Two hosts and a client on one network: namespaces, a bridge in each host, CNI with an address that never changes."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

BRIDGE: Final = "pods"
PREFIX_LENGTH: Final = 24


def ip(*arguments: str, namespace: str = "") -> None:
    command = ["ip", *(["-n", namespace] if namespace else []), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command}: {ran.stderr}"


def point_to_point(folder: Path) -> dict[str, Any]:
    """A pod on a cable of its own to its host, routes without a network of theirs."""
    return {
        "type": "ptp",
        "ipMasq": False,
        "mtu": 1460,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.77.0.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(folder / "ipam"),
        },
    }


def bridged(address: str) -> dict[str, Any]:
    """A pod on its host's bridge, with an address that was reserved for it."""
    return {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": False,
        "ipam": {"type": "static", "addresses": [{"address": f"{address}/{PREFIX_LENGTH}"}]},
    }


@dataclass(frozen=True, slots=True)
class Hosts:
    """Names of network namespaces."""

    a: str
    b: str
    client: str
    address_a: str = "10.78.1.1"
    address_b: str = "10.78.1.2"
    """For the channel between the hosts."""
    client_address: str = "10.78.0.9"


@contextlib.contextmanager
def two_hosts(prefix: str) -> Iterator[Hosts]:
    """`prefix` begins the namespaces' names. A switch in the client's namespace joins the hosts' bridges."""
    hosts = Hosts(f"{prefix}-a", f"{prefix}-b", f"{prefix}-c")
    names = (hosts.a, hosts.b, hosts.client)
    try:
        for name in names:
            ip("netns", "add", name)
            ip("link", "set", "lo", "up", namespace=name)
        ip("link", "add", "switch", "type", "bridge", namespace=hosts.client)
        ip(
            "address",
            "add",
            f"{hosts.client_address}/{PREFIX_LENGTH}",
            "dev",
            "switch",
            namespace=hosts.client,
        )
        ip("link", "set", "switch", "up", namespace=hosts.client)
        for host, address in ((hosts.a, hosts.address_a), (hosts.b, hosts.address_b)):
            # An address of its own: a bridge's is that of one of its ports, and changes as pods come and go.
            mac = f"02:00:00:00:01:{address.rpartition('.')[2]:0>2}"
            ip("link", "add", BRIDGE, "address", mac, "type", "bridge", namespace=host)
            ip("address", "add", f"{address}/{PREFIX_LENGTH}", "dev", BRIDGE, namespace=host)
            ip("link", "set", BRIDGE, "up", namespace=host)
            ip(
                "link",
                "add",
                "up0",
                "type",
                "veth",
                "peer",
                "name",
                f"to-{host[-1]}",
                "netns",
                hosts.client,
                namespace=host,
            )
            ip("link", "set", "up0", "master", BRIDGE, "up", namespace=host)
            ip("link", "set", f"to-{host[-1]}", "master", "switch", "up", namespace=hosts.client)
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
