"""What other implementations do wrong or differently (reference, section 7), and that we are built around it.

Each is shown over a real socket; the rules themselves are tested in test_server_calls and test_client_calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

import ttrpc
from tests.ttrpc.raw import (
    BIDI,
    CLIENT,
    SERVER,
    UNARY,
    Raw,
    echo,
    request,
    served_by_hand,
    serving,
    until,
    value,
)
from ttrpc import CallContext, Code, InboxLimits, RequestStream, StatusError
from ttrpc.frames import DATA, END_OF_STREAM, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE, encode
from ttrpc.wire.ttrpc_pb2 import Response

HELLO = BytesValue(value=b"hello")
OK = Response(payload=value(b"hello")).SerializeToString()


async def slow(request: BytesValue, context: CallContext) -> BytesValue:
    await asyncio.sleep(0.02)
    return request


async def twice(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
    yield request
    yield request


async def refuse(requests: RequestStream[BytesValue], context: CallContext) -> BytesValue:
    await anext(requests)
    raise StatusError(Code.ABORTED, "enough")


async def each(requests: RequestStream[BytesValue], context: CallContext) -> AsyncIterator[BytesValue]:
    async for message in requests:
        yield message


async def test_1_data_on_an_active_unary_call_does_not_kill_our_server_and_the_call_is_answered() -> None:
    async with serving((UNARY, slow)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, 0, request(UNARY, b"hello")), (1, DATA, 0, b"x"), (1, DATA, END_OF_STREAM, b""))
        assert await raw.frame() == (1, RESPONSE, 0, OK)


async def test_1_our_client_sends_nothing_after_the_request_of_a_call_that_does_not_stream() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send((1, DATA, 0, value(b"a")), (1, DATA, END_OF_STREAM, b""))
        async for _ in stream:
            pass
        unary = asyncio.create_task(client.unary(UNARY, HELLO))
        assert [(await raw.frame())[:3] for _ in range(2)] == [(1, REQUEST, REMOTE_CLOSED), (3, REQUEST, 0)]
        raw.send((3, RESPONSE, 0, OK))
        await unary
        await client.close()
        assert await raw.at_end()


async def test_2_data_that_is_still_coming_for_a_failed_stream_is_dropped_without_a_word() -> None:
    async with serving((CLIENT, refuse), (UNARY, echo)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, REMOTE_OPEN, request(CLIENT)), (1, DATA, 0, value(b"a")))
        assert await raw.error() == (1, Code.ABORTED, "enough")
        raw.send(*[(1, DATA, 0, value(b"late"))] * 50, (1, DATA, END_OF_STREAM, b""))
        raw.send((3, REQUEST, 0, request(UNARY, b"hello")))
        assert await raw.frame() == (3, RESPONSE, 0, OK)


async def test_3_a_stream_that_is_not_read_does_not_wedge_the_connection() -> None:
    async with served_by_hand(inbox=InboxLimits(messages_max=5, patience_s=0.02)) as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send(*[(1, DATA, 0, value(b"x"))] * 1000)
        call = asyncio.create_task(client.unary(UNARY, HELLO, timeout_s=5))
        raw.send((3, RESPONSE, 0, OK))
        assert await call == HELLO
        await until(lambda: stream._call.done)
        with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED"):
            await anext(stream)


async def test_3_our_server_stops_making_messages_when_its_client_goes() -> None:
    made = 0
    gone = asyncio.Event()

    async def handler(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        nonlocal made
        try:
            while True:
                made += 1
                yield request
        finally:
            gone.set()

    async with serving((SERVER, handler)) as (_, address):
        async with await Raw.to(address) as raw:
            raw.send((1, REQUEST, REMOTE_CLOSED, request(SERVER)))
            await raw.frame()
        async with asyncio.timeout(5):
            await gone.wait()
        before = made
        await asyncio.sleep(0.01)
        assert made == before


async def test_4_after_an_error_a_stream_raises_it_again_and_does_not_block() -> None:
    async with serving((SERVER, refuse_stream)) as (_, address), await ttrpc.connect(address) as client:
        stream = client.server_stream(SERVER, HELLO)
        for _ in range(3):
            with pytest.raises(StatusError, match="ABORTED: no"):
                await anext(stream)


async def refuse_stream(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
    raise StatusError(Code.ABORTED, "no")
    yield request


async def test_5_a_shutdown_waits_for_a_lone_unary_call_also_after_replies_to_stray_frames() -> None:
    async with serving((UNARY, slow)) as (server, address), await Raw.to(address) as raw:
        raw.send((2, REQUEST, 0, b""), (99, DATA, 0, b""))
        assert [(await raw.error())[0] for _ in range(2)] == [2, 99]
        raw.send((1, REQUEST, 0, request(UNARY, b"hello")))
        await until(lambda: any(connection.calls.open for connection in server._connections))
        ending = asyncio.create_task(server.shutdown(grace_s=5))
        assert await raw.frame() == (1, RESPONSE, 0, OK)
        assert await raw.at_end()
        await ending


async def test_7_a_half_closed_socket_ends_everything_in_flight() -> None:
    async with serving((UNARY, slow)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, 0, request(UNARY, b"hello")))
        raw.writer.write_eof()
        assert await raw.at_end()


async def test_8_one_slow_peer_check_or_connection_does_not_hold_up_the_next() -> None:
    async with serving((UNARY, echo)) as (_, address), await Raw.to(address) as silent:
        async with await ttrpc.connect(address) as client:
            assert await client.unary(UNARY, HELLO, timeout_s=5) == HELLO
        silent.send((1, REQUEST, 0, request(UNARY, b"hello")))
        assert await silent.frame() == (1, RESPONSE, 0, OK)


async def test_9_frames_for_strange_ids_and_second_responses_harm_nothing() -> None:
    async with served_by_hand() as (client, raw):
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        raw.send(
            (2, RESPONSE, 0, OK),
            (77, DATA, 0, b"x"),
            (1, 9, 0, b"?"),
            (1, RESPONSE, 0xFF, OK),
            (1, RESPONSE, 0, OK),
        )
        assert await call == HELLO


async def test_10_sending_on_a_stream_that_the_server_has_ended_is_refused() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.bidi_stream(BIDI)
        raw.send((1, DATA, END_OF_STREAM, b""))
        assert [message async for message in stream] == []
        with pytest.raises(StatusError, match="the server has ended the call"):
            await stream.send(HELLO)


async def test_a_stream_ends_with_a_close_frame_and_not_with_a_response() -> None:
    async with serving((SERVER, twice)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, REMOTE_CLOSED, request(SERVER, b"a")))
        frames = [await raw.frame() for _ in range(3)]
        assert frames == [(1, DATA, 0, value(b"a"))] * 2 + [(1, DATA, REMOTE_CLOSED | NO_DATA, b"")]


@pytest.mark.parametrize("flags", [REMOTE_OPEN, REMOTE_OPEN | NO_DATA])
async def test_both_ways_of_opening_a_client_stream_and_both_of_ending_it_are_understood(flags: int) -> None:
    async with serving((BIDI, each)) as (_, address), await Raw.to(address) as raw:
        raw.send(
            (1, REQUEST, flags, request(BIDI)),
            (1, DATA, 0, value(b"a")),
            (1, DATA, REMOTE_CLOSED, value(b"b")),
        )
        frames = [await raw.frame() for _ in range(3)]
        assert frames == [(1, DATA, 0, value(b"a")), (1, DATA, 0, value(b"b")), (1, DATA, END_OF_STREAM, b"")]


async def test_a_server_that_ends_a_stream_with_an_ok_response_gives_no_message_too_many() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send((1, DATA, 0, value(b"a")), (1, RESPONSE, 0, b""))
        assert [message.value async for message in stream] == [b"a"]


async def test_our_own_oversized_response_costs_its_call_and_not_the_connection() -> None:
    async def big(request: BytesValue, context: CallContext) -> BytesValue:
        return BytesValue(value=bytes(4194304))

    async with serving((UNARY, big), (SERVER, twice)) as (_, address), await ttrpc.connect(address) as client:
        with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED: message length 419"):
            await client.unary(UNARY, HELLO)
        assert len([message async for message in client.server_stream(SERVER, HELLO)]) == 2


async def test_an_old_clients_request_without_flags_is_served_as_registered() -> None:
    async with serving((SERVER, twice)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, 0, request(SERVER, b"a")))
        assert (await raw.frame())[1] == DATA


async def test_an_idle_connection_is_never_closed_by_us() -> None:
    async with serving((UNARY, echo)) as (server, address), await ttrpc.connect(address) as client:
        await client.unary(UNARY, HELLO, timeout_s=0.02)
        await asyncio.sleep(0.05)
        assert len(server._connections) == 1
        assert await client.unary(UNARY, HELLO) == HELLO


async def test_a_garbled_length_is_cut_at_once_and_not_read_to_its_end() -> None:
    async with serving((UNARY, echo)) as (_, address), await Raw.to(address) as raw:
        raw.writer.write(b"\xff\xff\xff\xff" + encode(1, REQUEST, 0, b"")[4:])
        assert await raw.at_end()
