"""The same on uvloop, whose transports are not asyncio's: every shape, deadlines, back-pressure, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

import ttrpc
from tests.ttrpc.raw import BIDI, CLIENT, SERVER, UNARY, echo, served_by_hand, serving, until, value
from ttrpc.aio.context import CallContext, RequestStream
from ttrpc.aio.serving import ServerConnection
from ttrpc.aio.streams import BidiStream
from ttrpc.codes import Code
from ttrpc.frames import DATA

uvloop = pytest.importorskip("uvloop")
HELLO = BytesValue(value=b"hello")


async def many(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
    for _ in range(3000):
        yield BytesValue(value=bytes(1000))


async def joined(requests: RequestStream[BytesValue], context: CallContext) -> BytesValue:
    return BytesValue(value=b"".join([request.value async for request in requests]))


async def each(requests: RequestStream[BytesValue], context: CallContext) -> AsyncIterator[BytesValue]:
    async for request in requests:
        yield request


async def never(request: BytesValue, context: CallContext) -> BytesValue:
    await asyncio.Event().wait()
    return request


async def conversation() -> None:
    handlers = ((UNARY, echo), (SERVER, many), (CLIENT, joined), (BIDI, each))
    async with serving(*handlers) as (server, address), await ttrpc.connect(address) as client:
        assert (
            await asyncio.gather(*(client.unary(UNARY, HELLO, timeout_s=9) for _ in range(64)))
            == [HELLO] * 64
        )
        assert len([message async for message in client.server_stream(SERVER, HELLO)]) == 3000
        stream = client.client_stream(CLIENT)
        for _ in range(500):
            await stream.send(BytesValue(value=bytes(1000)))
        assert len((await stream.response()).value) == 500_000
        async with client.bidi_stream(BIDI) as chat:
            assert isinstance(chat, BidiStream)
            await chat.send(HELLO)
            assert await anext(chat) == HELLO
        assert all(isinstance(connection, ServerConnection) for connection in server._connections)


async def ends() -> None:
    async with serving((UNARY, never)) as (server, address), await ttrpc.connect(address) as client:
        with pytest.raises(ttrpc.StatusError) as caught:
            await client.unary(UNARY, HELLO, timeout_s=0.02)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await until(lambda: any(connection.calls.open for connection in server._connections))
        await server.shutdown(grace_s=0)
        with pytest.raises(ttrpc.StatusError, match="UNAVAILABLE"):
            await call


async def unread() -> None:
    async with served_by_hand(inbox=ttrpc.InboxLimits(messages_max=4, patience_s=None)) as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send(*[(1, DATA, 0, value(b"x"))] * 20)
        await until(lambda: not client._connection._reading)
        for _ in range(20):
            await anext(stream)
        assert client._connection._reading


@pytest.mark.parametrize("work", [conversation, ends, unread], ids=lambda work: work.__name__)
def test_it_works_on_uvloop(work) -> None:  # type: ignore[no-untyped-def]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())  # Each asserts what it is about.
        assert isinstance(runner.get_loop(), uvloop.Loop)
