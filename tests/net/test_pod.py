"""A pod's interfaces as `ip` shows them, and their connection with taps: as data, and with the kernel."""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandshift.errors import NotFound, NotSupported, PeerProtocolError
from sandshift.net import batch
from sandshift.net.look import look
from sandshift.net.plan import Tap
from sandshift.net.pod import Interface, plan_pod, read_interfaces
from sandshift.network_namespace import run_in_file
from sandshift.sandbox.model import NetworkCard, Route
from tests.needs import needs_root

LO = {"ifindex": 1, "ifname": "lo", "link_type": "loopback", "mtu": 65536, "addr_info": []}
ETH0 = {
    "ifindex": 3,
    "ifname": "eth0",
    "link_type": "ether",
    "address": "f6:59:17:bb:33:bd",
    "mtu": 1450,
    "addr_info": [
        {"local": "10.22.0.5", "prefixlen": 24, "scope": "global"},
        {"local": "fd00::5", "prefixlen": 64, "scope": "global"},
        {"local": "fe80::f459:17ff:febb:33bd", "prefixlen": 64, "scope": "link"},
    ],
}
ROUTES = [
    {"dst": "default", "gateway": "10.22.0.1", "dev": "eth0", "flags": ["onlink"]},
    {"dst": "10.22.0.1", "dev": "eth0", "scope": "link", "prefsrc": "10.22.0.5", "flags": []},
    {"type": "unreachable", "dst": "10.99.0.0/16", "dev": "eth0", "flags": []},
    {"dst": "10.9.0.0/16", "dev": "net1", "flags": []},
]
ROUTES_SIX = [
    {"dst": "fe80::/64", "dev": "eth0", "flags": []},
    {"dst": "default", "gateway": "fd00::1", "dev": "eth0", "flags": []},
]


def shown(*documents: object) -> str:
    return "\n".join(json.dumps(document) for document in documents)


def test_an_interface_is_read_with_its_addresses_and_all_of_its_routes() -> None:
    tap = {**ETH0, "ifindex": 4, "ifname": "ss12"}
    found = read_interfaces(shown([tap, ETH0, LO], ROUTES), shown(ROUTES_SIX), taps=["ss12"])
    assert found == (
        Interface(
            name="eth0",
            mac="f6:59:17:bb:33:bd",
            mtu_bytes=1450,
            addresses=("10.22.0.5/24", "fd00::5/64"),
            routes=(
                Route("0.0.0.0/0", gateway="10.22.0.1", on_link=True),
                Route("10.22.0.1/32", source="10.22.0.5"),
                Route("::/0", gateway="fd00::1"),
            ),
        ),
    )
    assert found[0].card("net0") == NetworkCard(
        "net0",
        mac="f6:59:17:bb:33:bd",
        addresses=("10.22.0.5/24", "fd00::5/64"),
        mtu=1450,
        routes=found[0].routes,
    )


def test_interfaces_come_in_the_order_of_their_numbers_and_none_is_no_error() -> None:
    second = {**ETH0, "ifindex": 9, "ifname": "net1"}
    found = read_interfaces(shown([second, ETH0], []), "")
    assert [interface.name for interface in found] == ["eth0", "net1"]
    assert read_interfaces(shown([LO]), "") == ()


def test_a_route_that_goes_several_ways_is_refused_by_name() -> None:
    routes = [{"dst": "default", "nexthops": [{"dev": "eth0"}, {"dev": "net1"}], "flags": []}]
    with pytest.raises(NotSupported, match="interface eth0: its route to default goes several ways at once"):
        read_interfaces(shown([ETH0], routes), "")


@pytest.mark.parametrize("text", ["no", "[1]", "[] [] []"])
def test_what_ip_does_not_print_is_an_error(text: str) -> None:
    with pytest.raises(PeerProtocolError, match="'ip -j' printed what cannot be read"):
        read_interfaces(text, "")


def test_a_plan_makes_the_taps_first_and_takes_back_only_what_is_ours() -> None:
    (interface,) = read_interfaces(shown([ETH0], []), "")
    plan = plan_pod([(interface, Tap("ss12", mtu_bytes=1450))])
    assert [program for program, _ in plan.stages()] == ["ip", "tc"]
    assert plan.undo_batches() == (
        ("tc", "qdisc del dev eth0 ingress\n"),
        ("ip", "link delete dev ss12\n"),
    )


# With the kernel


@dataclass
class PodNetwork:
    """What CNI leaves: eth0 in the pod's namespace, its other end in the host's."""

    pod: str
    host: str

    @property
    def file(self) -> str:
        return f"/run/netns/{self.pod}"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[PodNetwork]:
    pod, host = f"ctd-p{os.getpid()}", f"ctd-h{os.getpid()}"
    for name in (pod, host):
        run("ip", "netns", "add", name)
    run(
        "ip",
        "-n",
        pod,
        "link",
        "add",
        "eth0",
        "mtu",
        "1450",
        "type",
        "veth",
        "peer",
        "name",
        "p0",
        "netns",
        host,
    )
    for name, interface in ((pod, "eth0"), (host, "p0")):
        run("ip", "-n", name, "link", "set", interface, "addrgenmode", "none", "up")
    run("ip", "-n", pod, "address", "add", "10.22.0.5/24", "dev", "eth0")
    run("ip", "-n", pod, "route", "add", "default", "via", "10.22.0.1")
    yield PodNetwork(pod, host)
    for name in (pod, host):
        run("ip", "netns", "delete", name)


def open_tap(name: str) -> int:
    """As QEMU opens it, but without its header. Source: linux/if_tun.h."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    iff_tap, iff_no_pi, iff_vnet_hdr, tunsetiff = 0x0002, 0x1000, 0x4000, 0x400454CA
    fcntl.ioctl(
        descriptor, tunsetiff, struct.pack("16sH14x", name.encode(), iff_tap | iff_no_pi | iff_vnet_hdr)
    )
    return descriptor


def packets_on(interface: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
    found.bind((interface, 0x88B5))
    found.settimeout(5)
    return found


FRAME = (
    b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + b"\x88\xb5"
)  # EtherType: local experimental. Source: IEEE 802.
NO_OFFLOAD = bytes(10)
"""virtio_net_hdr."""


@pytest.mark.vm
@needs_root
async def test_what_arrives_at_the_interface_comes_out_of_the_tap_and_the_other_way_round(
    network: PodNetwork,
) -> None:
    (interface,) = await look(network.file)
    assert interface.addresses == ("10.22.0.5/24",)
    assert interface.routes == (
        Route("0.0.0.0/0", gateway="10.22.0.1"),
        Route("10.22.0.0/24", source="10.22.0.5"),
    )
    plan = plan_pod([(interface, Tap("ssctd0", mtu_bytes=interface.mtu_bytes))])
    await batch.apply(plan, network_namespace=network.file)
    assert [one.name for one in await look(network.file, taps=["ssctd0"])] == ["eth0"]
    tap = run_in_file(network.file, lambda: open_tap("ssctd0"))
    outside = run_in_file(f"/run/netns/{network.host}", lambda: packets_on("p0"))
    with outside:
        outside.send(FRAME + b"to the guest")
        assert await_frame(tap)[10:] == FRAME + b"to the guest"
        os.write(tap, NO_OFFLOAD + FRAME + b"from the guest")
        assert outside.recv(2000) == FRAME + b"from the guest"
    os.close(tap)
    await batch.remove(plan, network_namespace=network.file)
    assert "ingress" not in shown_by("tc", "qdisc", "show", "dev", "eth0", namespace=network.file)


def await_frame(tap: int) -> bytes:
    while True:
        assert select.select([tap], [], [], 5)[0] == [tap]
        frame = os.read(tap, 2000)
        if b"\x88\xb5" in frame[22:24]:
            return frame


def shown_by(*command: str, namespace: str) -> str:
    ran = subprocess.run(
        ["nsenter", f"--net={namespace}", *command], capture_output=True, text=True, check=True
    )
    return ran.stdout


@pytest.mark.vm
@needs_root
async def test_what_an_earlier_shim_left_on_the_interface_is_replaced(network: PodNetwork) -> None:
    (interface,) = await look(network.file)
    for tap in ("ssctd0", "ssctd1"):
        await batch.apply(plan_pod([(interface, Tap(tap))]), network_namespace=network.file)
    filters = shown_by("tc", "filter", "show", "dev", "eth0", "parent", "ffff:", namespace=network.file)
    assert "Redirect to device ssctd1" in filters
    assert "ssctd0" not in filters


@pytest.mark.vm
@needs_root
async def test_of_a_plan_that_fails_nothing_stays(network: PodNetwork) -> None:
    (interface,) = await look(network.file)
    gone = Interface("net7", interface.mac, 1450, (), ())
    with pytest.raises(NotFound, match="interface net7 does not exist"):
        await batch.apply(
            plan_pod([(interface, Tap("ssctd0")), (gone, Tap("ssctd1"))]), network_namespace=network.file
        )
    assert [one.name for one in await look(network.file)] == ["eth0"]
    assert "ingress" not in shown_by("tc", "qdisc", "show", "dev", "eth0", namespace=network.file)


async def test_a_namespace_that_is_gone_is_said_so() -> None:
    with pytest.raises(
        NotFound, match="network namespace /run/netns/nope does not exist: the pod's network is gone"
    ):
        await look("/run/netns/nope")
    assert not Path("/run/netns/nope").exists()
