"""The connection between the two hosts."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sandshift.errors import Unavailable
from sandshift.fleet import channel as channel_module
from sandshift.fleet.channel import describe, make_channel
from sandshift.wire.migration import messages_pb2
from tests.fleet.test_host import host_at


async def test_both_ends_are_of_one_connection(tmp_path: Path) -> None:
    channel = await make_channel(host_at(tmp_path, "a"), host_at(tmp_path, "b"))
    try:
        assert channel.source.getsockname() == channel.destination.getpeername()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(channel.source, b"x")
        assert await loop.sock_recv(channel.destination, 1) == b"x"
        for end in (channel.source, channel.destination):
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    finally:
        channel.close()
    assert channel.source.fileno() == -1


async def test_a_stranger_who_connects_first_is_turned_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers: list[socket.socket] = []
    connect = channel_module.connect_tcp

    async def connect_after_a_stranger(
        name: str, address: str, port: int, *, timeout_s: float
    ) -> socket.socket:
        strangers.append(socket.create_connection((address, port)))
        return await connect(name, address, port, timeout_s=timeout_s)

    monkeypatch.setattr(channel_module, "connect_tcp", connect_after_a_stranger)
    channel = await make_channel(host_at(tmp_path, "a"), host_at(tmp_path, "b"))
    try:
        assert channel.destination.getpeername() == channel.source.getsockname()
        assert strangers[0].recv(1) == b""
    finally:
        channel.close()
        strangers[0].close()


async def test_an_address_that_is_not_the_destinations_is_named(tmp_path: Path) -> None:
    there = host_at(tmp_path, "b")
    elsewhere = msgspec.structs.replace(
        there.config, host=msgspec.structs.replace(there.config.host, migration_address="192.0.2.7")
    )
    with pytest.raises(Unavailable, match=r"cannot listen on 192\.0\.2\.7"):
        await make_channel(host_at(tmp_path, "a"), replace(there, config=elsewhere))


def test_a_descriptor_says_what_the_kernel_says() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as end,
    ):
        described = messages_pb2.SocketDescriptor.FromString(describe(end))
        assert (described.version, described.pid, described.fd) == (1, os.getpid(), end.fileno())
        assert (described.family, described.type, described.protocol) == (
            socket.AF_INET,
            socket.SOCK_STREAM,
            socket.IPPROTO_TCP,
        )
        assert described.so_cookie == int.from_bytes(end.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
