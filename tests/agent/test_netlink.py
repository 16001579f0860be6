"""Messages for the kernel's network, and one real namespace that takes them."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from sandshift.agent import netlink

NAMESPACE = f"gi-nl-{os.getpid()}"


def test_a_link_message_is_laid_out_as_the_kernel_reads_it():
    assert netlink.link(2, mac="52:54:00:00:00:01", mtu=1400).hex() == (
        "34000000"
        "1000"
        "0500"
        "01000000"
        "00000000"  # header: length, RTM_NEWLINK, request and ack, sequence
        "00000000"
        "02000000"
        "01000000"
        "01000000"  # family, type, index, up, change up
        "0a000100"
        "525400000001"
        "0000"  # IFLA_ADDRESS
        "08000400"
        "78050000"  # IFLA_MTU
    )


@pytest.mark.parametrize(
    "text", ["10.9.0.50", "10.9.0.50/33", "10.9.0/24", "fd00::1/129", "host/24", "10.0.0.1/", ""]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="address"):
        netlink.address(1, text)


@pytest.mark.parametrize("text", ["52:54:00:00:00", "zz:54:00:00:00:01", "01:00:5e:00:00:01", ""])
def test_what_is_no_card_address_is_refused(text):
    with pytest.raises(ValueError, match="no network card's address"):
        netlink.hardware_address(text)


def in_namespace(job):
    """Run `job` in a thread that has entered the namespace."""
    outcome = []

    def run():
        with Path(f"/run/netns/{NAMESPACE}").open() as namespace:
            setns = __import__("ctypes").CDLL(None, use_errno=True).setns
            assert setns(namespace.fileno(), 0x40000000) == 0
        try:
            outcome.append(job())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@pytest.fixture
def namespace():
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    subprocess.run(
        ["ip", "-n", NAMESPACE, "link", "add", "gi0", "type", "veth", "peer", "name", "gi1"], check=True
    )
    subprocess.run(["ip", "-n", NAMESPACE, "link", "set", "gi1", "up"], check=True)
    yield NAMESPACE
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)


@pytest.mark.vm
def test_a_card_gets_its_addresses_and_its_way_out_and_a_repeat_does_no_harm(namespace):
    def job():
        index = socket.if_nametoindex("gi0")
        netlink.apply(
            [
                netlink.link(1),
                netlink.link(index, mac="52:54:00:00:00:07", mtu=1400),
                netlink.address(index, "10.9.0.50/24"),
                netlink.address(index, "fd00::5/64"),
                netlink.default_route(index, "10.9.0.1"),
            ]
        )

    in_namespace(job)
    in_namespace(job)
    shown = subprocess.run(
        ["ip", "-n", NAMESPACE, "addr", "show", "gi0"], capture_output=True, text=True, check=True
    ).stdout
    routes = subprocess.run(
        ["ip", "-n", NAMESPACE, "route"], capture_output=True, text=True, check=True
    ).stdout
    assert "52:54:00:00:00:07" in shown
    assert "mtu 1400" in shown
    assert "inet 10.9.0.50/24 brd 10.9.0.255" in shown
    assert "inet6 fd00::5/64" in shown
    assert "default via 10.9.0.1 dev gi0" in routes


@pytest.mark.vm
def test_a_card_with_routes_of_its_own_has_these_and_no_other(namespace):
    def job():
        index = socket.if_nametoindex("gi0")
        netlink.apply(
            [
                netlink.link(1),
                netlink.link(index),
                netlink.address(index, "10.22.0.5/24", with_route=False),
                netlink.address(index, "fd22::5/64", with_route=False),
                netlink.route(index, "10.22.0.1/32", source="10.22.0.5"),
                netlink.route(index, "10.22.0.0/24", gateway="10.22.0.1", source="10.22.0.5"),
                netlink.route(index, "0.0.0.0/0", gateway="192.0.2.1", on_link=True),
                netlink.route(index, "::/0", gateway="fd00::1", on_link=True),
            ]
        )

    in_namespace(job)
    in_namespace(job)
    four, six = (
        subprocess.run(
            ["ip", "-n", NAMESPACE, family, "route"], capture_output=True, text=True, check=True
        ).stdout
        for family in ("-4", "-6")
    )
    assert {line.strip() for line in four.splitlines()} == {
        "10.22.0.1 dev gi0 proto static scope link src 10.22.0.5",
        "10.22.0.0/24 via 10.22.0.1 dev gi0 proto static src 10.22.0.5",
        "default via 192.0.2.1 dev gi0 proto static onlink",
    }
    assert "default via fd00::1 dev gi0 proto static metric 1024 onlink pref medium" in six
    assert "fd22::/64" not in six


@pytest.mark.vm
def test_what_the_kernel_refuses_is_an_error(namespace):
    with pytest.raises(OSError, match="message 20 was refused"):
        in_namespace(lambda: netlink.apply([netlink.address(4242, "10.9.0.50/24")]))
