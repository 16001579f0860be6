"""The link on an event loop, over sockets that behave like a virtio-serial port."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from sandshift.link.transport import GuestLink, HostLink
from tests.link.port import Port


@pytest.fixture
async def port(tmp_path):
    made = Port(tmp_path / "agent")
    yield made
    await made.close()


@pytest.fixture
async def guest(port):
    link = GuestLink(port.guest_descriptor)
    yield link
    link.close()


async def read_exactly(connection, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = await connection.read(1 << 20)
        assert piece, f"the connection ended after {len(data)} of {count} bytes"
        data += piece
    return bytes(data)


async def send(connection, data: bytes, piece_bytes: int = 50_000) -> None:
    for place in range(0, len(data), piece_bytes):
        connection.write(data[place : place + piece_bytes])
        await connection.drain()


async def test_bytes_go_both_ways(port, guest):
    host = HostLink.connect(str(port.path))
    host.connection.write(b"hello guest")
    connection = await anext(guest.connections())
    assert await connection.read(100) == b"hello guest"
    connection.write(b"hello host")
    assert await host.connection.read(100) == b"hello host"
    assert host.is_open
    await host.close()


async def test_megabytes_arrive_whole_while_ranges_are_lost(port, guest):
    chance = random.Random(1)
    down, up = chance.randbytes(1 << 20), chance.randbytes(2 << 20)
    host = HostLink.connect(str(port.path))
    host.connection.write(b"!")
    connection = await anext(guest.connections())
    assert await connection.read(1) == b"!"

    async def lose() -> None:
        while True:
            port.lose_down, port.lose_up = chance.randrange(3000), chance.randrange(30_000)
            mark = port.carried_up + port.carried_down
            while port.carried_up + port.carried_down < mark + 400_000:
                await asyncio.sleep(0.001)

    losing = asyncio.create_task(lose())
    async with asyncio.TaskGroup() as group:
        group.create_task(send(host.connection, down))
        group.create_task(send(connection, up))
        got_down = group.create_task(read_exactly(connection, len(down)))
        got_up = group.create_task(read_exactly(host.connection, len(up)))
    losing.cancel()
    assert got_down.result() == down
    assert got_up.result() == up
    await host.close()


async def test_a_socket_that_is_cut_and_back_again_is_not_noticed(port, guest):
    host = HostLink.connect(str(port.path))
    host.connection.write(b"before")
    connection = await anext(guest.connections())
    assert await connection.read(100) == b"before"
    connection.write(b"x")
    assert await host.connection.read(1) == b"x"
    await port.cut()
    host.connection.write(b"after")
    assert await connection.read(100) == b"after"
    connection.write(b"and back")
    assert await host.connection.read(100) == b"and back"
    await host.close()


async def test_a_new_host_ends_the_connection_of_the_one_before(port, guest):
    connections = guest.connections()
    old_host = HostLink.connect(str(port.path))
    old_host.connection.write(b"old")
    old = await anext(connections)
    assert await old.read(10) == b"old"
    old_host.abort()
    new_host = HostLink.connect(str(port.path))
    new_host.connection.write(b"new")
    new = await anext(connections)
    assert await new.read(10) == b"new"
    assert await old.read(10) == b""
    assert new.epoch != old.epoch
    await new_host.close()


async def test_what_is_written_before_the_guest_runs_arrives_when_it_does(port, guest):
    port.running.clear()
    host = HostLink.connect(str(port.path))
    host.connection.write(b"early")
    assert not host.is_open
    port.running.set()
    connection = await anext(guest.connections())
    assert await connection.read(10) == b"early"
    await host.close()


async def test_a_host_that_closes_is_seen_by_the_guest_after_its_last_word(port, guest):
    host = HostLink.connect(str(port.path))
    host.connection.write(b"last word")
    connection = await anext(guest.connections())

    async def read_all() -> bytes:
        data = bytearray()
        while piece := await connection.read(100):
            data += piece
        return bytes(data)

    reading = asyncio.create_task(read_all())
    await host.close()
    assert await reading == b"last word"


async def test_a_dead_vm_ends_the_connection(port, guest):
    host = HostLink.connect(str(port.path))
    host.connection.write(b"x")
    connection = await anext(guest.connections())
    assert await connection.read(1) == b"x"
    reading = asyncio.create_task(host.connection.read(1))
    await port.close()
    assert await reading == b""
    with pytest.raises(ConnectionResetError, match="the link's connection is over"):
        await host.connection.drain()


async def test_a_listener_that_hangs_up_at_once_is_not_called_for_ever(tmp_path):
    accepted = 0

    async def hang_up(reader, writer) -> None:
        nonlocal accepted
        accepted += 1
        writer.close()

    server = await asyncio.start_unix_server(hang_up, tmp_path / "agent")
    host = HostLink.connect(str(tmp_path / "agent"))
    assert await host.connection.read(1) == b""
    assert accepted == 1
    server.close()


async def test_writers_wait_while_nobody_reads(port, guest):
    host = HostLink.connect(str(port.path))
    host.connection.write(b"x")
    connection = await anext(guest.connections())
    written = 0

    async def write_for_ever() -> None:
        nonlocal written
        while True:
            connection.write(bytes(100_000))
            written += 100_000
            await connection.drain()

    writing = asyncio.create_task(write_for_ever())
    async with asyncio.timeout(20):
        while written < 1 << 20:
            await asyncio.sleep(0.001)
    await asyncio.wait([writing], timeout=0.2)
    assert not writing.done()
    writing.cancel()
    assert (1 << 20) <= written <= (1 << 20) + 100_000
    assert len(await read_exactly(host.connection, written)) == written
    host.abort()


async def test_an_idle_guest_without_a_host_does_not_spin(port, guest):
    before = os.times()
    await asyncio.sleep(0.3)
    after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.15
