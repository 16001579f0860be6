"""Our client against containerd's own ttrpc server, in Go."""

from __future__ import annotations

import asyncio
import signal

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue, Int32Value, Int64Value, StringValue, UInt64Value

import ttrpc
from tests.interop import echo
from ttrpc import Code, StatusError
from ttrpc.wire.ttrpc_pb2 import Request, Response

LIMIT = ttrpc.MESSAGE_BYTES_MAX


async def still_here(client: ttrpc.Client) -> None:
    answer = await client.unary(echo.ECHO, BytesValue(value=b"still here"), timeout_s=30)
    assert answer.value == b"still here"


async def test_unary_calls_also_empty_ones(client: ttrpc.Client) -> None:
    for value in (b"hello", b""):
        assert (await client.unary(echo.ECHO, BytesValue(value=value))).value == value


async def test_64_callers_at_a_time(client: ttrpc.Client) -> None:
    async def call(caller: int) -> None:
        for number in range(30):
            value = f"{number} of {caller}".encode()
            assert (await client.unary(echo.ECHO, BytesValue(value=value), timeout_s=10)).value == value

    await asyncio.gather(*(call(caller) for caller in range(64)))


async def test_metadata_of_unary_calls_with_several_values(client: ttrpc.Client) -> None:
    answer = await client.unary(
        echo.METADATA,
        StringValue(value="containerd-namespace-ttrpc"),
        metadata={"Containerd-Namespace-Ttrpc": ["k8s.io", "second"]},
    )
    assert answer.value == "k8s.io|second"


async def test_the_deadline_reaches_the_server(client: ttrpc.Client) -> None:
    left = (await client.unary(echo.TIME_LEFT, Empty(), timeout_s=7)).value
    assert 5000 < left <= 7000
    assert (await client.unary(echo.TIME_LEFT, Empty())).value == -1


async def test_a_deadline_that_passes_ends_the_call_and_the_servers_handler(client: ttrpc.Client) -> None:
    with pytest.raises(StatusError) as caught:
        await client.unary(echo.SLEEP, Int64Value(value=10_000), timeout_s=0.05)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    async with asyncio.timeout(30):
        while (await client.unary(echo.CANCELLED, Empty())).value != 1:
            pass


@pytest.mark.parametrize("number", [*range(1, 17), 42, -1])
async def test_every_code_comes_through_with_message_and_details(client: ttrpc.Client, number: int) -> None:
    with pytest.raises(StatusError) as caught:
        await client.unary(echo.FAIL, Int32Value(value=number))
    error = caught.value
    assert (error.number, error.code, error.message) == (number, Code.of(number), f"code {number}")
    detail = StringValue()
    assert error.details[0].Unpack(detail)
    assert detail.value == "detail"


async def test_unknown_names_are_unimplemented(client: ttrpc.Client) -> None:
    for service, name, message in (("No", "Echo", "service No"), ("interop.Echo", "No", "method No")):
        with pytest.raises(StatusError) as caught:
            await client.unary(ttrpc.Method(service, name, ttrpc.Shape.UNARY, Empty, Empty), Empty())
        assert (caught.value.code, caught.value.message) == (Code.UNIMPLEMENTED, message)


@pytest.mark.parametrize("count", [0, 1, 5000])
async def test_server_streams(client: ttrpc.Client, count: int) -> None:
    stream = client.server_stream(echo.COUNT, Int64Value(value=count))
    assert [message.value async for message in stream] == list(range(count))


async def test_empty_messages_of_a_stream_are_messages(client: ttrpc.Client) -> None:
    stream = client.server_stream(echo.BLAST, UInt64Value(value=3 << 32))
    assert [message.value async for message in stream] == [b"", b"", b""]


async def test_what_came_before_an_error_is_given_first(client: ttrpc.Client) -> None:
    stream = client.server_stream(echo.COUNT_FAIL, Int64Value(value=3))
    got = [(await anext(stream)).value for _ in range(3)]
    with pytest.raises(StatusError) as caught:
        await anext(stream)
    assert (got, caught.value.code, caught.value.message) == ([0, 1, 2], Code.ABORTED, "after the last")


@pytest.mark.parametrize("count", [0, 1, 300])
async def test_client_streams(client: ttrpc.Client, count: int) -> None:
    stream = client.client_stream(echo.SUM)
    for number in range(count):
        await stream.send(Int64Value(value=number))
    assert (await stream.response()).value == sum(range(count))


async def test_a_refused_client_stream_tells_the_sender_and_harms_nobody(client: ttrpc.Client) -> None:
    stream = client.client_stream(echo.REFUSE)
    # No more than its queue of five: Go's server (up to 1.2.8) stops reading the connection for good behind a handler
    # that has returned with a full queue.
    await stream.send(Int64Value(value=1))
    with pytest.raises(StatusError) as caught:
        await stream.response()
    assert (caught.value.code, caught.value.message) == (Code.FAILED_PRECONDITION, "enough")
    with pytest.raises(StatusError, match="enough"):
        await stream.send(Int64Value(value=2))
    await still_here(client)


async def test_64_bidirectional_streams_at_a_time(client: ttrpc.Client) -> None:
    async def chat(number: int) -> None:
        async with client.bidi_stream(echo.CHAT) as stream:
            for turn in range(20):
                message = BytesValue(value=bytes((number, turn)) * number)
                await stream.send(message)
                assert await anext(stream) == message
            stream.end_sending()
            assert [late async for late in stream] == []

    await asyncio.gather(*(chat(number) for number in range(64)))


async def test_a_request_at_the_limit_passes_and_one_above_is_refused_before_it_is_sent(
    client: ttrpc.Client,
) -> None:
    def envelope(size: int) -> int:
        payload = BytesValue(value=bytes(size)).SerializeToString()
        return Request(service="interop.Echo", method="Sink", payload=payload).ByteSize()

    size = LIMIT - 64
    size += LIMIT - envelope(size)
    assert envelope(size) == LIMIT
    await client.unary(echo.SINK, BytesValue(value=bytes(size)))
    with pytest.raises(StatusError) as caught:
        await client.unary(echo.SINK, BytesValue(value=bytes(size + 1)))
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert caught.value.message == "message length 4194305 exceed maximum message size of 4194304"
    await still_here(client)


async def test_a_response_at_the_limit_passes(client: ttrpc.Client) -> None:
    size = LIMIT - 10
    payload = BytesValue(value=bytes(size)).SerializeToString()
    assert Response(payload=payload).ByteSize() == LIMIT
    assert len((await client.unary(echo.BIG, Int64Value(value=size))).value) == size


async def test_gos_server_drops_the_connection_over_its_own_oversized_response(client: ttrpc.Client) -> None:
    other = asyncio.create_task(client.unary(echo.SLEEP, Int64Value(value=5000)))
    await asyncio.sleep(0)
    with pytest.raises(ttrpc.ConnectionClosed):
        await client.unary(echo.BIG, Int64Value(value=LIMIT))
    with pytest.raises(ttrpc.ConnectionClosed):
        await other


async def test_stream_messages_at_the_limit_pass(client: ttrpc.Client) -> None:
    async with client.bidi_stream(echo.CHAT) as stream:
        message = BytesValue(value=bytes(LIMIT - 5))
        assert message.ByteSize() == LIMIT
        await stream.send(message)
        assert await anext(stream) == message
        with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED"):
            await stream.send(BytesValue(value=bytes(LIMIT - 4)))
        await stream.send(BytesValue(value=b"the stream lives on"))
        assert (await anext(stream)).value == b"the stream lives on"


async def test_cancelling_a_call_harms_no_other(client: ttrpc.Client) -> None:
    calls = [asyncio.create_task(client.unary(echo.SLEEP, Int64Value(value=100))) for _ in range(20)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError, Empty] * 10
    await still_here(client)


async def test_a_cancelled_stream_is_forgotten_while_the_server_goes_on_sending(client: ttrpc.Client) -> None:
    stream = client.server_stream(echo.FOREVER, Empty())
    await anext(stream)
    stream.cancel()
    with pytest.raises(StatusError, match="CANCELLED"):
        await anext(stream)
    await client.unary(echo.SLEEP, Int64Value(value=20))
    await still_here(client)


async def test_closing_the_connection_cancels_gos_handlers(
    client: ttrpc.Client, go_server: tuple[str, asyncio.subprocess.Process]
) -> None:
    async with await ttrpc.connect(go_server[0]) as other:
        stream = other.server_stream(echo.FOREVER, Empty())
        await anext(stream)
        call = asyncio.create_task(other.unary(echo.SLEEP, Int64Value(value=60_000)))
        # Sent after the call, as a task of its own; Go reads in order, so it has the call before it answers this.
        await asyncio.create_task(still_here(other))
    with pytest.raises(ttrpc.ConnectionClosed):
        await call
    async with asyncio.timeout(5):
        while (await client.unary(echo.CANCELLED, Empty())).value < 2:
            pass


async def test_a_killed_server_ends_every_call_with_connection_closed(
    client: ttrpc.Client, go_server: tuple[str, asyncio.subprocess.Process]
) -> None:
    stream = client.server_stream(echo.FOREVER, Empty())
    await anext(stream)
    calls = [asyncio.create_task(client.unary(echo.SLEEP, Int64Value(value=60_000))) for _ in range(10)]
    await anext(stream)
    go_server[1].send_signal(signal.SIGKILL)
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [ttrpc.ConnectionClosed] * 10
    with pytest.raises(ttrpc.ConnectionClosed):
        async for _ in stream:
            pass
    assert client.closed.is_set()
    with pytest.raises(ttrpc.ConnectionClosed):
        await client.unary(echo.ECHO, BytesValue())


async def test_a_unary_method_called_as_a_stream_gives_its_one_message(client: ttrpc.Client) -> None:
    as_stream = ttrpc.Method("interop.Echo", "Echo", ttrpc.Shape.SERVER_STREAM, BytesValue, BytesValue)
    for value in (b"one", b""):
        stream = client.server_stream(as_stream, BytesValue(value=value))
        assert [message.value async for message in stream] == [value]


async def test_a_stream_method_called_as_unary_fails_alone(client: ttrpc.Client) -> None:
    as_unary = ttrpc.Method("interop.Echo", "Count", ttrpc.Shape.UNARY, Int64Value, Int64Value)
    with pytest.raises(StatusError) as caught:
        await client.unary(as_unary, Int64Value(value=3))
    assert caught.value.code is Code.INTERNAL
    await still_here(client)


async def test_streams_carry_metadata_and_deadline_though_gos_client_sends_neither(
    client: ttrpc.Client,
) -> None:
    stream = client.server_stream(echo.FOREVER, Empty(), timeout_s=0.1, metadata={"a": "b"})
    with pytest.raises(StatusError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await still_here(client)
