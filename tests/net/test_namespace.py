"""Sockets in other network namespaces, made without moving the caller."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from pathlib import Path

import pytest

from sandshift import net
from sandshift.errors import NotFound, TimedOut, Unavailable
from tests.needs import needs_root

pytestmark = needs_root


@pytest.fixture
def namespace():
    name = f"sstestns-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


def here() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


def test_an_action_runs_inside_and_the_caller_stays_where_it_was(namespace):
    before = here()
    inside = net.run_in(namespace, here)
    assert inside != before
    assert inside == f"net:[{Path('/run/netns', namespace).stat().st_ino}]"
    assert here() == before


def test_without_a_name_the_action_runs_where_the_caller_is():
    assert net.run_in("", here) == here()


def test_what_the_action_raises_reaches_the_caller(namespace):
    with pytest.raises(ZeroDivisionError):
        net.run_in(namespace, lambda: 1 / 0)


def test_a_missing_namespace_is_named():
    with pytest.raises(NotFound, match="network namespace sstest-nowhere does not exist"):
        net.run_in("sstest-nowhere", here)


async def test_a_connection_is_made_and_accepted_inside(namespace):
    with net.listen_tcp(namespace, "127.0.0.1") as listener:
        port = listener.getsockname()[1]
        client, server = await asyncio.gather(
            net.connect_tcp(namespace, "127.0.0.1", port, timeout_s=5),
            net.accept_tcp(listener, timeout_s=5),
        )
        with client, server:
            for end in client, server:
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            await asyncio.get_running_loop().sock_sendall(client, b"hello")
            assert await asyncio.get_running_loop().sock_recv(server, 100) == b"hello"
        with pytest.raises(Unavailable, match=f"cannot connect to 127.0.0.1 port {port}: Connection refused"):
            await net.connect_tcp("", "127.0.0.1", port, timeout_s=5)


async def test_a_port_that_is_taken_is_named(namespace):
    with net.listen_tcp(namespace, "127.0.0.1") as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            Unavailable, match=f"port {port} in network namespace {namespace}: Address already"
        ):
            net.listen_tcp(namespace, "127.0.0.1", port)


async def test_waiting_for_nobody_ends_with_the_bound(namespace):
    with net.listen_tcp(namespace, "127.0.0.1") as listener, pytest.raises(TimedOut, match=r"within 0\.01 s"):
        await net.accept_tcp(listener, timeout_s=0.01)
