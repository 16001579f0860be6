"""ttrpc.aio.transport: ttrpc over whatever carries bytes."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

import ttrpc
from tests.ttrpc.raw import BIDI, CLIENT, SERVER, UNARY, echo, until
from ttrpc.aio.transport import Pump

HELLO = BytesValue(value=b"hello")


class Pipe:
    """One end of a pair in memory that takes so much and then makes its writer wait."""

    def __init__(self, room: int = 1 << 16) -> None:
        self.incoming = bytearray()
        self.peer: Pipe = self
        self.closed = False
        self.changed = asyncio.Event()
        self.room = room
        self.fail: Exception | None = None

    def _notify(self) -> None:
        for end in (self, self.peer):
            end.changed.set()

    async def read(self, n: int, /) -> bytes:
        while not self.incoming:
            if self.fail is not None:
                raise self.fail
            if self.closed or self.peer.closed:
                return b""
            self.changed.clear()
            await self.changed.wait()
        data = bytes(self.incoming[:n])
        del self.incoming[:n]
        self._notify()
        return data

    def write(self, data: bytes, /) -> None:
        self.peer.incoming += data
        self._notify()

    async def drain(self) -> None:
        while len(self.peer.incoming) > self.room and not self.closed and not self.peer.closed:
            self.changed.clear()
            await self.changed.wait()
        if self.fail is not None:
            raise self.fail

    def close(self) -> None:
        self.closed = True
        self._notify()


def pair() -> tuple[Pipe, Pipe]:
    one, two = Pipe(), Pipe()
    one.peer, two.peer = two, one
    return one, two


async def joined(requests: ttrpc.RequestStream[BytesValue], context: ttrpc.CallContext) -> BytesValue:
    return BytesValue(value=b"".join([request.value async for request in requests]))


async def twice(request: BytesValue, context: ttrpc.CallContext):  # type: ignore[no-untyped-def]
    for _ in range(2):
        yield request


async def each(requests: ttrpc.RequestStream[BytesValue], context: ttrpc.CallContext):  # type: ignore[no-untyped-def]
    async for request in requests:
        yield request


def server() -> ttrpc.Server:
    made = ttrpc.Server()
    for method, handler in ((UNARY, echo), (SERVER, twice), (CLIENT, joined), (BIDI, each)):
        made.add(method, handler)
    return made


async def test_every_shape_works_over_a_transport_of_ones_own() -> None:
    ours, theirs = pair()
    serving = asyncio.create_task(server().serve_connection(theirs))
    async with ttrpc.Client.over(ours) as client:
        assert await client.unary(UNARY, HELLO, timeout_s=5) == HELLO
        assert [message async for message in client.server_stream(SERVER, HELLO)] == [HELLO, HELLO]
        stream = client.client_stream(CLIENT)
        for _ in range(3):
            await stream.send(HELLO)
        assert (await stream.response()).value == b"hello" * 3
        async with client.bidi_stream(BIDI) as chat:
            await chat.send(HELLO)
            assert await anext(chat) == HELLO
    await serving
    assert (ours.closed, theirs.closed) == (True, True)


async def test_large_messages_pass_through_a_narrow_one() -> None:
    ours, theirs = pair()
    serving = asyncio.create_task(server().serve_connection(theirs))
    async with ttrpc.Client.over(ours) as client:
        big = BytesValue(value=bytes(3_000_000))
        results = await asyncio.gather(*(client.unary(UNARY, big) for _ in range(4)))
        assert results == [big] * 4
    await serving


async def test_the_peer_is_whom_the_caller_names() -> None:
    seen: list[ttrpc.Peer | None] = []

    async def handler(request: BytesValue, context: ttrpc.CallContext) -> BytesValue:
        seen.append(context.peer)
        return request

    made = ttrpc.Server()
    made.add(UNARY, handler)
    for peer in (None, ttrpc.Peer(1, 2, 3)):
        ours, theirs = pair()
        serving = asyncio.create_task(made.serve_connection(theirs, peer=peer))
        async with ttrpc.Client.over(ours) as client:
            await client.unary(UNARY, HELLO)
        await serving
    assert seen == [None, ttrpc.Peer(1, 2, 3)]


async def test_a_transport_that_breaks_ends_the_connection_with_its_reason() -> None:
    ours, _ = pair()
    client = ttrpc.Client.over(ours)
    call = asyncio.create_task(client.unary(UNARY, HELLO))
    await asyncio.sleep(0)
    ours.fail = OSError("the cable is out")
    ours.changed.set()
    with pytest.raises(ttrpc.ConnectionClosed, match="the cable is out"):
        await call
    await client.closed.wait()


async def test_a_transport_that_cannot_be_drained_ends_the_connection() -> None:
    ours, theirs = pair()
    client = ttrpc.Client.over(ours)
    stream = client.client_stream(CLIENT)
    ours.fail = OSError("full")

    async def send() -> None:
        for _ in range(100):
            await stream.send(BytesValue(value=bytes(100_000)))

    with pytest.raises(ttrpc.ConnectionClosed):
        await send()
    await client.closed.wait()
    assert theirs.peer.closed


async def test_a_slow_transport_makes_senders_wait() -> None:
    ours, theirs = pair()
    client = ttrpc.Client.over(ours)
    stream = client.client_stream(CLIENT)
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await stream.send(BytesValue(value=bytes(50_000)))
            sent += 1

    sending = asyncio.create_task(send())
    await until(lambda: not client._connection.writable)
    before = sent
    assert before < 50
    while sent == before:
        await theirs.read(1 << 16)
    sending.cancel()
    await client.close()


async def test_cancelling_serve_connection_cuts_it() -> None:
    ours, theirs = pair()
    serving = asyncio.create_task(server().serve_connection(theirs))
    client = ttrpc.Client.over(ours)
    await client.unary(UNARY, HELLO)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    await client.closed.wait()


async def test_shutdown_ends_connections_over_transports_too() -> None:
    ours, theirs = pair()
    made = server()
    serving = asyncio.create_task(made.serve_connection(theirs))
    client = ttrpc.Client.over(ours)
    await client.unary(UNARY, HELLO)
    assert not client.closed.is_set()
    await made.shutdown(grace_s=1)
    await serving
    await client.closed.wait()
    assert client.closed.is_set()


async def test_it_looks_like_a_transport_of_asyncio() -> None:
    ours, _ = pair()
    client = ttrpc.Client.over(ours)
    pump = client._connection._transport
    assert isinstance(pump, Pump)
    assert (pump.get_extra_info("socket", "none"), pump.is_closing()) == ("none", False)
    await client.close()
    assert pump.is_closing()
    pump.write(b"ignored")
