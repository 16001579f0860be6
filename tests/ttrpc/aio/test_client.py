"""ttrpc.aio.client and streams: a client, with a server that does what the test says."""

from __future__ import annotations

import asyncio
import gc
import socket
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

import ttrpc
from tests.ttrpc.raw import BIDI, CLIENT, SERVER, UNARY, abstract, echo, served_by_hand, serving, until, value
from ttrpc import Code, ConnectionClosed, InboxLimits, StatusError
from ttrpc.frames import DATA, END_OF_STREAM, REQUEST, RESPONSE, encode
from ttrpc.wire.ttrpc_pb2 import Request, Response, Status

HELLO = BytesValue(value=b"hello")
OK = Response(payload=value(b"hello")).SerializeToString()


async def test_answers_find_their_calls_in_whatever_order_they_come() -> None:
    async with served_by_hand() as (client, raw):
        calls = [asyncio.create_task(client.unary(UNARY, HELLO)) for _ in range(10)]
        ids = [(await raw.frame())[0] for _ in calls]
        assert ids == list(range(1, 20, 2))
        raw.send(
            *(
                (stream, RESPONSE, 0, Response(payload=value(bytes([stream]))).SerializeToString())
                for stream in ids[::-1]
            )
        )
        assert [(await call).value for call in calls] == [bytes([stream]) for stream in ids]


async def test_the_deadline_is_kept_here_even_if_the_server_says_nothing() -> None:
    async with served_by_hand() as (client, raw):
        with pytest.raises(StatusError) as caught:
            await client.unary(UNARY, HELLO, timeout_s=0.02)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        sent = Request.FromString((await raw.frame())[3])  # type: ignore[arg-type]
        assert sent.timeout_nano == 20_000_000
        # Its late answer harms nothing.
        raw.send((1, RESPONSE, 0, OK), (3, RESPONSE, 0, OK))
        assert await client.unary(UNARY, HELLO, timeout_s=5) == HELLO


@pytest.mark.parametrize("timeout_s", [0, -1])
async def test_a_call_without_time_is_not_sent(timeout_s: float) -> None:
    async with served_by_hand() as (client, raw):
        with pytest.raises(StatusError, match="DEADLINE_EXCEEDED"):
            await client.unary(UNARY, HELLO, timeout_s=timeout_s)
        call = asyncio.create_task(client.unary(UNARY, HELLO, timeout_s=float("inf")))
        stream, _, _, data = await raw.frame()
        assert (stream, Request.FromString(data).timeout_nano) == (1, 0)  # type: ignore[arg-type]
        call.cancel()


async def test_one_timer_serves_all_deadlines_and_none_is_kept_for_calls_that_ended() -> None:
    async with served_by_hand() as (client, raw):
        calls = [
            asyncio.create_task(client.unary(UNARY, HELLO, timeout_s=60 + number)) for number in range(50)
        ]
        frames = [await raw.frame() for _ in calls]
        connection = client._connection
        assert connection._timer is not None
        raw.send(*((stream, RESPONSE, 0, OK) for stream, *_ in frames))
        await asyncio.gather(*calls)
        assert connection.deadlines.next_due_s() is None


async def test_cancelling_a_call_ends_it_alone() -> None:
    async with served_by_hand() as (client, raw):
        first = asyncio.create_task(client.unary(UNARY, HELLO, timeout_s=60))
        second = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        await raw.frame()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert list(client._connection.calls.open) == [3]
        raw.send((1, RESPONSE, 0, OK), (3, RESPONSE, 0, OK))
        assert await second == HELLO


async def test_wait_for_and_gather_work_as_with_any_coroutine() -> None:
    async with served_by_hand() as (client, raw):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.unary(UNARY, HELLO), 0.01)
        both = asyncio.gather(client.unary(UNARY, HELLO), client.unary(UNARY, HELLO))
        streams = [(await raw.frame())[0] for _ in range(3)]
        raw.send(*((stream, RESPONSE, 0, OK) for stream in streams))
        assert await both == [HELLO, HELLO]


async def test_a_task_that_is_cancelled_after_its_answer_has_come_is_cancelled() -> None:
    async with served_by_hand() as (client, raw):
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        client._connection.calls.receive([(1, RESPONSE, 0, OK)])
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (Response(status=Status(code=7, message="no")).SerializeToString(), Code.PERMISSION_DENIED),
        (Response(payload=b"\xff").SerializeToString(), Code.INTERNAL),
        (b"\xff", Code.INTERNAL),
    ],
)
async def test_errors_and_nonsense_end_their_call_alone(data: bytes, code: Code) -> None:
    async with served_by_hand() as (client, raw):
        bad = asyncio.create_task(client.unary(UNARY, HELLO))
        good = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        raw.send((1, RESPONSE, 0, data), (3, RESPONSE, 0, OK))
        with pytest.raises(StatusError) as caught:
            await bad
        assert caught.value.code is code
        assert await good == HELLO


async def test_an_oversized_response_ends_its_call_and_not_the_connection() -> None:
    async with served_by_hand() as (client, raw):
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        raw.writer.write(encode(1, RESPONSE, 0, bytes(4194305)))
        with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED: message length 4194305 exceed"):
            await call
        raw.send((3, RESPONSE, 0, OK))
        assert await client.unary(UNARY, HELLO) == HELLO


async def test_a_server_that_breaks_the_protocol_is_left() -> None:
    async with served_by_hand() as (client, raw):
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        raw.writer.write(b"\xff" * 10)
        with pytest.raises(
            ConnectionClosed, match="the server broke the protocol: a frame of 4294967295 bytes"
        ):
            await call
        await client.closed.wait()


async def test_when_the_server_goes_every_call_says_so_and_a_new_client_goes_on() -> None:
    async with served_by_hand() as (client, raw):
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        stream = client.bidi_stream(BIDI)
        raw.send((3, DATA, 0, value(b"before")))
        assert (await anext(stream)).value == b"before"
        raw.writer.close()
        for pending in (call, anext(stream), stream.send(HELLO), client.unary(UNARY, HELLO)):
            with pytest.raises(ConnectionClosed) as caught:
                await pending
            assert caught.value.code is Code.UNAVAILABLE
        assert client.closed.is_set()
    async with serving((UNARY, echo)) as (_, address), await ttrpc.connect(address) as again:
        assert await again.unary(UNARY, HELLO) == HELLO


async def test_closing_ends_open_calls_and_may_be_done_twice() -> None:
    async with served_by_hand() as (client, raw):
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await raw.frame()
        await client.close()
        with pytest.raises(ConnectionClosed, match="closed by this client"):
            await call
        await client.close()
        assert await raw.at_end()


# Streams.


async def test_a_stream_gives_what_came_and_then_its_end_again_and_again() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send((1, DATA, 0, value(b"a")), (1, DATA, 0, b""), (1, DATA, END_OF_STREAM, b""))
        assert [message.value async for message in stream] == [b"a", b""]
        assert [message.value async for message in stream] == []


async def test_waiting_for_the_next_message_may_be_given_up_and_taken_up_again() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        raw.send((1, DATA, 0, value(b"a")))
        assert (await anext(stream)).value == b"a"


async def test_one_task_at_a_time_waits_for_a_stream() -> None:
    async with served_by_hand() as (client, _):
        stream = client.server_stream(SERVER, HELLO)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one task at a time"):
            await anext(stream)
        first.cancel()


async def test_a_cancelled_stream_tells_its_reader_and_forgets_what_came() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        reading = asyncio.create_task(anext(stream))
        await raw.frame()
        stream.cancel()
        stream.cancel()
        with pytest.raises(StatusError, match="CANCELLED"):
            await reading
        raw.send((1, DATA, 0, value(b"late")), (3, RESPONSE, 0, OK))
        assert await client.unary(UNARY, HELLO) == HELLO


async def test_leaving_the_block_cancels_and_so_does_dropping_the_stream() -> None:
    async with served_by_hand() as (client, _):
        async with client.server_stream(SERVER, HELLO):
            pass
        assert client._connection.calls.open == {}
        client.server_stream(SERVER, HELLO)
        gc.collect()
        await until(lambda: client._connection.calls.open == {})


async def test_a_streams_deadline_ends_it() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.server_stream(SERVER, HELLO, timeout_s=0.03, metadata={"k": "v"})
        sent = Request.FromString((await raw.frame())[3])  # type: ignore[arg-type]
        assert (sent.timeout_nano, sent.metadata[0].value) == (30_000_000, "v")
        with pytest.raises(StatusError, match="DEADLINE_EXCEEDED"):
            await anext(stream)


async def test_a_stream_that_ended_in_time_leaves_no_deadline() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.server_stream(SERVER, HELLO, timeout_s=60)
        raw.send((1, DATA, 0, value(b"a")), (1, DATA, END_OF_STREAM, b""))
        await until(lambda: stream._call.done)
        assert [message.value async for message in stream] == [b"a"]
        assert client._connection.deadlines.next_due_s() is None


async def test_a_stream_that_nobody_reads_is_given_up_and_other_calls_go_on() -> None:
    limits = InboxLimits(messages_max=10, patience_s=0.05)
    async with served_by_hand(inbox=limits) as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send(*[(1, DATA, 0, value(b"x"))] * 50)
        await until(lambda: not client._connection._reading)
        raw.send((3, RESPONSE, 0, OK))
        assert await client.unary(UNARY, HELLO, timeout_s=5) == HELLO
        with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED: the stream was not read"):
            await anext(stream)


async def test_without_any_patience_other_calls_do_not_wait_at_all() -> None:
    async with served_by_hand(inbox=InboxLimits(messages_max=10, patience_s=0)) as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send(*[(1, DATA, 0, value(b"x"))] * 50)
        await until(lambda: stream._call.done)
        assert client._connection._reading
        with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED"):
            await anext(stream)


async def test_with_endless_patience_the_connection_waits_and_nothing_is_lost() -> None:
    async with served_by_hand(inbox=InboxLimits(messages_max=4, patience_s=None)) as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send(*[(1, DATA, 0, value(bytes([number]))) for number in range(100)])
        await until(lambda: not client._connection._reading)
        raw.send(*[(1, DATA, 0, value(bytes([number]))) for number in range(100, 200)])
        raw.send((1, DATA, END_OF_STREAM, b""))
        assert [message.value[0] async for message in stream] == list(range(200))


async def test_a_reader_that_catches_up_within_its_patience_loses_nothing() -> None:
    async with served_by_hand(inbox=InboxLimits(messages_max=4, patience_s=30)) as (client, raw):
        stream = client.server_stream(SERVER, HELLO)
        raw.send(*[(1, DATA, 0, value(b"x"))] * 9)
        await until(lambda: not client._connection._reading)
        for _ in range(7):
            await anext(stream)
        assert client._connection._reading
        assert client._connection._patience == {}


async def test_a_client_stream_sends_ends_and_gets_its_response() -> None:
    async with served_by_hand() as (client, raw):
        stream = client.client_stream(CLIENT)
        await stream.send(HELLO)
        response = asyncio.create_task(stream.response())
        frames = [await raw.frame() for _ in range(3)]
        assert [frame[1:] for frame in frames[1:]] == [(DATA, 0, value(b"hello")), (DATA, END_OF_STREAM, b"")]
        assert frames[0][1:3] == (REQUEST, 2)
        raw.send((1, RESPONSE, 0, OK))
        assert await response == HELLO
        with pytest.raises(StatusError, match="the server has ended the call"):
            await stream.send(HELLO)


async def test_cancelling_the_wait_for_a_response_ends_the_call() -> None:
    async with served_by_hand() as (client, _):
        stream = client.client_stream(CLIENT)
        response = asyncio.create_task(stream.response())
        await asyncio.sleep(0)
        response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await response
        assert client._connection.calls.open == {}


async def test_a_sender_waits_for_a_server_that_does_not_read() -> None:
    async with served_by_hand() as (client, raw):
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        stream = client.client_stream(CLIENT)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await stream.send(BytesValue(value=bytes(100_000)))
                sent += 1

        sending = asyncio.create_task(send())
        await until(lambda: not client._connection.writable)
        assert sent < 50
        with pytest.raises(StatusError, match="DEADLINE_EXCEEDED"):
            await client.unary(UNARY, HELLO, timeout_s=0.01)
        unary = asyncio.create_task(client.unary(UNARY, HELLO))
        await asyncio.sleep(0)
        before = sent
        raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await until(lambda: sent > before)
        sending.cancel()
        unary.cancel()


# Connecting.


async def test_connecting_where_nobody_listens_fails_at_once() -> None:
    with pytest.raises(ConnectionRefusedError):
        await ttrpc.connect(abstract())
    with pytest.raises(ValueError, match="only Unix sockets have addresses here"):
        await ttrpc.connect("tcp://localhost:1")


async def test_connecting_to_a_full_backlog_ends_in_time(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        first = await ttrpc.connect(path)
        with pytest.raises(TimeoutError):
            await ttrpc.connect(path, timeout_s=0.05)
        waiting = asyncio.create_task(ttrpc.connect(path))
        await asyncio.sleep(0)
        accepted = listening.accept()[0]
        second = await waiting
        with listening.accept()[0], accepted:
            await first.close()
            await second.close()


async def test_a_connected_socket_is_taken_over() -> None:
    ours, theirs = socket.socketpair()
    server = ttrpc.Server()
    server.add(UNARY, echo)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    serving_it = asyncio.create_task(server.serve_connection(ttrpc.StreamTransport(reader, writer)))
    async with await ttrpc.connect(ours) as client:
        assert await client.unary(UNARY, HELLO) == HELLO
    await serving_it
