"""ttrpc.aio.server, serving, context: a server on its sockets."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

import ttrpc
from tests.ttrpc.raw import BIDI, CLIENT, SERVER, UNARY, Raw, echo, request, serving, until, value
from ttrpc import CallContext, Code, InboxLimits, PeerPolicy, RequestStream, StatusError
from ttrpc.frames import DATA, END_OF_STREAM, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE, encode
from ttrpc.wire.ttrpc_pb2 import Response

HELLO = BytesValue(value=b"hello")


async def forever(request: BytesValue, context: CallContext) -> BytesValue:
    await asyncio.Event().wait()
    return request


class Cancelled:
    """A handler that never answers and counts how often it was cancelled."""

    def __init__(self) -> None:
        self.started = 0
        self.count = 0

    async def __call__(self, request: Any, context: CallContext) -> BytesValue:
        self.started += 1
        try:
            return await forever(request, context)
        except asyncio.CancelledError:
            self.count += 1
            raise


# Handlers.


async def test_a_handler_knows_metadata_deadline_peer_and_method() -> None:
    seen: list[CallContext] = []

    async def handler(request: BytesValue, context: CallContext) -> BytesValue:
        seen.append(context)
        return request

    async with serving((UNARY, handler)) as (_, address), await ttrpc.connect(address) as client:
        await client.unary(UNARY, HELLO, timeout_s=2.5, metadata={"Key": "v"})
        await client.unary(UNARY, HELLO)
    assert (seen[0].metadata["key"], seen[0].timeout_s, seen[0].method) == ("v", 2.5, UNARY)
    assert seen[0].peer == ttrpc.Peer(os.getpid(), os.geteuid(), os.getegid())
    assert (len(seen[1].metadata), seen[1].timeout_s, seen[1].ended) == (0, None, True)


async def test_handlers_run_side_by_side_and_answer_in_any_order() -> None:
    gate = asyncio.Event()

    async def handler(request: BytesValue, context: CallContext) -> BytesValue:
        if request.value == b"wait":
            await gate.wait()
        else:
            gate.set()
        return request

    async with serving((UNARY, handler)) as (_, address), await ttrpc.connect(address) as client:
        first = asyncio.create_task(client.unary(UNARY, BytesValue(value=b"wait")))
        await asyncio.sleep(0)
        assert (await client.unary(UNARY, HELLO)).value == b"hello"
        assert (await first).value == b"wait"


async def test_timeouts_task_groups_and_the_current_task_work_from_a_handlers_first_line_on() -> None:
    async def handler(request: BytesValue, context: CallContext) -> BytesValue:
        assert asyncio.current_task() is not None
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(echo(request, context))
            return task.result()
        raise AssertionError

    async with serving((UNARY, handler)) as (_, address), await ttrpc.connect(address) as client:
        assert (await client.unary(UNARY, HELLO)).value == b"hello"


async def test_context_variables_of_one_call_are_not_seen_by_the_next() -> None:
    variable = contextvars.ContextVar("variable", default=b"none")

    async def handler(request: BytesValue, context: CallContext) -> BytesValue:
        before = variable.get()
        variable.set(request.value)
        return BytesValue(value=before)

    async with serving((UNARY, handler)) as (_, address), await ttrpc.connect(address) as client:
        assert [(await client.unary(UNARY, HELLO)).value for _ in range(2)] == [b"none"] * 2


async def test_a_handlers_bug_is_logged_and_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: BytesValue, context: CallContext) -> BytesValue:
        raise ValueError("secret")

    async def broken_stream(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        yield request
        raise ValueError("secret")

    async with (
        serving((UNARY, broken), (SERVER, broken_stream)) as (_, address),
        await ttrpc.connect(address) as client,
    ):
        with caplog.at_level(logging.ERROR, "ttrpc"), pytest.raises(StatusError) as unary:
            await client.unary(UNARY, HELLO)
        stream = client.server_stream(SERVER, HELLO)
        await anext(stream)
        with pytest.raises(StatusError) as streaming:
            await anext(stream)
    for caught in (unary, streaming):
        assert caught.value.code is Code.UNKNOWN
        assert "secret" not in str(caught.value)
    assert [record.getMessage() for record in caplog.records] == [
        "/raw.Raw/Unary: the handler raised ValueError",
        "/raw.Raw/Server: the handler raised ValueError",
    ]


async def test_a_handler_that_answers_no_message_is_a_bug_of_the_handler() -> None:
    async def handler(request: BytesValue, context: CallContext) -> None:
        return None

    async with serving((UNARY, handler)) as (_, address), await ttrpc.connect(address) as client:
        with pytest.raises(StatusError, match="UNKNOWN"):
            await client.unary(UNARY, HELLO)


async def test_interceptors_stand_around_handlers_the_first_outermost() -> None:
    order: list[str] = []

    def unary(name: str) -> ttrpc.UnaryInterceptor:
        async def intercept(request: Any, context: CallContext, proceed: ttrpc.UnaryNext) -> Any:
            order.append(f"{name} {context.method.name}")
            response = await proceed(request, context)
            order.append(f"{name} done")
            return response

        return intercept

    async def stream(request: Any, context: CallContext, proceed: ttrpc.StreamNext) -> AsyncIterator[Any]:
        order.append(f"stream {context.method.name}")
        async for response in proceed(request, context):
            yield BytesValue(value=response.value.upper())

    async def handler(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        yield request

    options = {"unary_interceptors": (unary("a"), unary("b")), "stream_interceptors": (stream,)}
    async with (
        serving((UNARY, echo), (SERVER, handler), **options) as (_, address),
        await ttrpc.connect(address) as client,
    ):
        await client.unary(UNARY, HELLO)
        assert [message.value async for message in client.server_stream(SERVER, HELLO)] == [b"HELLO"]
    assert order == ["a Unary", "b Unary", "b done", "a done", "stream Server"]


async def test_an_interceptor_may_refuse() -> None:
    async def refuse(request: Any, context: CallContext, proceed: ttrpc.UnaryNext) -> Any:
        raise StatusError(Code.PERMISSION_DENIED, "not you")

    options = {"unary_interceptors": (refuse,)}
    async with serving((UNARY, echo), **options) as (_, address), await ttrpc.connect(address) as client:
        with pytest.raises(StatusError, match="PERMISSION_DENIED: not you"):
            await client.unary(UNARY, HELLO)


# Deadlines, cancellation, disconnects.


async def test_a_deadline_that_passes_cancels_the_handler_and_is_answered() -> None:
    handler = Cancelled()
    async with serving((UNARY, handler), (CLIENT, handler)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, 0, request(UNARY, timeout_nano=20_000_000)))
        raw.send((3, REQUEST, REMOTE_OPEN, request(CLIENT, timeout_nano=20_000_000)))
        ends = sorted([await raw.error(), await raw.error()])
        assert ends == [(stream, Code.DEADLINE_EXCEEDED, "context deadline exceeded") for stream in (1, 3)]
        await until(lambda: handler.count == 2)


async def test_a_call_that_arrives_too_late_is_not_begun() -> None:
    handler = Cancelled()
    async with serving((UNARY, handler)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, 0, request(UNARY, timeout_nano=-1)))
        assert await raw.error() == (1, Code.DEADLINE_EXCEEDED, "context deadline exceeded")
    assert handler.started == 0


@pytest.mark.parametrize("how", ["close", "half-close"])
async def test_a_connection_that_ends_cancels_all_of_its_handlers_and_no_others(how: str) -> None:
    handler = Cancelled()
    async with (
        serving((UNARY, handler), (SERVER, echo)) as (_, address),
        await ttrpc.connect(address) as other,
    ):
        kept = asyncio.create_task(other.unary(UNARY, HELLO))
        async with await Raw.to(address) as raw:
            raw.send((1, REQUEST, 0, request(UNARY)), (3, REQUEST, 0, request(UNARY)))
            await until(lambda: handler.started == 3)
            if how == "half-close":
                raw.writer.write_eof()
                assert await raw.at_end()
        await until(lambda: handler.count == 2)
        assert not kept.done()
        kept.cancel()


async def test_a_handler_that_ignores_its_cancellation_answers_nobody() -> None:
    ended = asyncio.Event()

    async def stubborn(request: BytesValue, context: CallContext) -> BytesValue:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert context.ended
            ended.set()
        return request

    async with serving((UNARY, stubborn)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, 0, request(UNARY, timeout_nano=1)))
        assert (await raw.error())[1] is Code.DEADLINE_EXCEEDED
        await ended.wait()
        raw.send((3, REQUEST, 0, request(UNARY, timeout_nano=1)))
        assert (await raw.error())[0] == 3


async def test_a_generator_is_closed_when_its_connection_goes() -> None:
    closed = asyncio.Event()

    async def handler(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        try:
            while True:
                yield request
                await asyncio.sleep(0)
        finally:
            closed.set()

    async with serving((SERVER, handler)) as (_, address):
        async with await ttrpc.connect(address) as client:
            await anext(client.server_stream(SERVER, HELLO))
            assert not closed.is_set()
        async with asyncio.timeout(5):
            assert await closed.wait()


# Bounds.


async def test_the_call_above_the_limit_is_refused_and_the_next_is_served() -> None:
    gate = asyncio.Event()

    async def handler(request: BytesValue, context: CallContext) -> BytesValue:
        await gate.wait()
        return request

    async with (
        serving((UNARY, handler), max_concurrent_calls=2) as (_, address),
        await ttrpc.connect(address) as client,
    ):
        calls = [asyncio.create_task(client.unary(UNARY, HELLO)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(StatusError, match="2 calls are in flight on this connection"):
            await client.unary(UNARY, HELLO)
        gate.set()
        await asyncio.gather(*calls)
        assert await client.unary(UNARY, HELLO) == HELLO


async def test_a_frame_above_the_hard_bound_cuts_its_connection_and_no_other() -> None:
    async with (
        serving((UNARY, echo)) as (_, address),
        await ttrpc.connect(address) as other,
        await Raw.to(address) as raw,
    ):
        raw.writer.write(b"\xff" * 10)
        assert await raw.at_end()
        assert await other.unary(UNARY, HELLO) == HELLO


async def test_an_oversized_request_is_skipped_answered_and_harms_nothing() -> None:
    async with serving((UNARY, echo)) as (_, address), await Raw.to(address) as raw:
        raw.writer.write(encode(1, REQUEST, 0, bytes(4194305)))
        raw.send((3, REQUEST, 0, request(UNARY, b"x")))
        message = "message length 4194305 exceed maximum message size of 4194304"
        assert await raw.error() == (1, Code.RESOURCE_EXHAUSTED, message)
        assert await raw.frame() == (3, RESPONSE, 0, Response(payload=value(b"x")).SerializeToString())


async def test_a_stream_message_above_the_limit_ends_its_stream_with_an_error() -> None:
    async def handler(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        yield request
        yield BytesValue(value=bytes(4194304))

    async with (
        serving((SERVER, handler), (UNARY, echo)) as (_, address),
        await ttrpc.connect(address) as client,
    ):
        stream = client.server_stream(SERVER, HELLO)
        assert await anext(stream) == HELLO
        with pytest.raises(StatusError, match="RESOURCE_EXHAUSTED"):
            await anext(stream)
        assert await client.unary(UNARY, HELLO) == HELLO


async def test_a_client_that_does_not_take_its_stream_stops_the_generator() -> None:
    made = 0

    async def handler(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        nonlocal made
        while True:
            made += 1
            yield BytesValue(value=bytes(10_000))

    async with serving((SERVER, handler), (UNARY, echo)) as (_, address), await Raw.to(address) as raw:
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        raw.send((1, REQUEST, REMOTE_CLOSED, request(SERVER)))
        before = -1
        while made != before or not made:
            before = made
            await asyncio.sleep(0.05)
        # The kernel's buffer, ours, and one write in between.
        assert made * 10_000 < 2_000_000
        async with await ttrpc.connect(address) as other:
            assert await other.unary(UNARY, HELLO) == HELLO


async def test_a_client_that_takes_no_answers_gets_to_ask_no_more() -> None:
    answered = 0

    async def handler(request: BytesValue, context: CallContext) -> BytesValue:
        nonlocal answered
        answered += 1
        return BytesValue(value=bytes(100_000))

    async with serving((UNARY, handler)) as (_, address), await Raw.to(address) as raw:
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for number in range(2000):
            raw.send((2 * number + 1, REQUEST, 0, request(UNARY, bytes(1000))))
        before = -1
        while answered != before or not answered:
            before = answered
            await asyncio.sleep(0.05)
        assert answered < 1000
        raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for number in range(2000):
            assert (await raw.frame())[0] == 2 * number + 1
        assert answered == 2000


async def test_a_handler_that_stops_reading_holds_up_others_for_its_patience_and_then_loses_its_call() -> (
    None
):
    handler = Cancelled()
    limits = InboxLimits(messages_max=10, patience_s=0.05)
    async with (
        serving((CLIENT, handler), (UNARY, echo), inbox=limits) as (_, address),
        await ttrpc.connect(address) as client,
    ):
        stream = client.client_stream(CLIENT)
        for _ in range(100):
            await stream.send(HELLO)
        assert await client.unary(UNARY, HELLO, timeout_s=5) == HELLO
        with pytest.raises(StatusError, match="the handler does not read what the client sends"):
            await stream.response()
        await until(lambda: handler.count == 1)


async def test_without_any_patience_a_handler_that_does_not_read_loses_its_call_at_once() -> None:
    handler = Cancelled()
    limits = InboxLimits(messages_max=10, patience_s=0)
    async with serving((CLIENT, handler), inbox=limits) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, REMOTE_OPEN, request(CLIENT)), *[(1, DATA, 0, value(b"x"))] * 50)
        message = "the handler does not read what the client sends"
        assert await raw.error() == (1, Code.RESOURCE_EXHAUSTED, message)
        await until(lambda: handler.count == 1)


async def test_a_handler_that_reads_slowly_but_reads_loses_nothing() -> None:
    async def handler(requests: RequestStream[BytesValue], context: CallContext) -> BytesValue:
        got = bytearray()
        async for message in requests:
            got += message.value
            await asyncio.sleep(0)
        return BytesValue(value=bytes(got))

    async with (
        serving((CLIENT, handler), inbox=InboxLimits(messages_max=4)) as (_, address),
        await ttrpc.connect(address) as client,
    ):
        stream = client.client_stream(CLIENT)
        for number in range(200):
            await stream.send(BytesValue(value=bytes([number])))
        assert (await stream.response()).value == bytes(range(200))


async def test_a_message_that_cannot_be_read_fails_its_stream_alone() -> None:
    async def handler(requests: RequestStream[BytesValue], context: CallContext) -> AsyncIterator[BytesValue]:
        async for message in requests:
            yield message

    async with serving((BIDI, handler)) as (_, address), await Raw.to(address) as raw:
        raw.send((1, REQUEST, REMOTE_OPEN, request(BIDI)), (3, REQUEST, REMOTE_OPEN, request(BIDI)))
        raw.send((1, DATA, 0, b"\xff"), (3, DATA, 0, value(b"x")), (3, DATA, END_OF_STREAM, b""))
        ends = [await raw.frame() for _ in range(3)]
        assert sorted((stream, kind) for stream, kind, _, _ in ends) == [(1, RESPONSE), (3, DATA), (3, DATA)]
        failed = Response.FromString(next(data for stream, _, _, data in ends if stream == 1))  # type: ignore[arg-type]
        assert failed.status.code == Code.INTERNAL


async def test_two_tasks_cannot_read_one_stream_of_requests() -> None:
    async def handler(requests: RequestStream[BytesValue], context: CallContext) -> BytesValue:
        first = asyncio.create_task(anext(requests))
        await asyncio.sleep(0)
        try:
            await anext(requests)
        except RuntimeError as error:
            return BytesValue(value=str(error).encode())
        finally:
            first.cancel()
        return HELLO

    async with (
        serving((CLIENT, handler)) as (_, address),
        await ttrpc.connect(address) as client,
        client.client_stream(CLIENT) as stream,
    ):
        await stream._connection.wait(stream._call)
        assert b"one task at a time" in stream._call.payload


# Who may connect.


async def test_a_peer_that_is_not_allowed_is_closed_before_its_first_byte_is_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nobody = PeerPolicy.users([os.geteuid() + 1])
    with caplog.at_level(logging.WARNING, "ttrpc"):
        async with serving((UNARY, echo), allow=nobody) as (server, address), await Raw.to(address) as raw:
            assert await raw.at_end()
            assert server._connections == set()
    assert f"refused Peer(pid={os.getpid()}" in caplog.text


async def test_over_tcp_there_are_no_credentials_and_only_anyone_is_allowed() -> None:
    for allow, served in ((PeerPolicy.same_user_or_root(), False), (PeerPolicy.anyone(), True)):
        server = ttrpc.Server(allow=allow)
        server.add(UNARY, echo)
        listening = socket.create_server(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(listening))
        connected = socket.create_connection(listening.getsockname())
        async with await ttrpc.connect(connected) as client:
            if served:
                assert await client.unary(UNARY, HELLO, timeout_s=5) == HELLO
            else:
                with pytest.raises(ttrpc.ConnectionClosed):
                    await client.unary(UNARY, HELLO, timeout_s=5)
        await server.shutdown()
        await task


async def test_connections_above_the_limit_wait_for_one_to_end() -> None:
    async with serving((UNARY, echo), max_connections=1) as (_, address):
        first = await ttrpc.connect(address)
        second = await ttrpc.connect(address)
        waiting = asyncio.create_task(second.unary(UNARY, HELLO))
        assert await first.unary(UNARY, HELLO) == HELLO
        assert not waiting.done()
        await first.close()
        assert await waiting == HELLO
        await second.close()


# The end.


async def test_shutting_down_lets_a_lone_call_end_though_its_connection_was_idle_but_for_it() -> None:
    gate = asyncio.Event()
    entered = asyncio.Event()

    async def handler(request: BytesValue, context: CallContext) -> BytesValue:
        entered.set()
        await gate.wait()
        return request

    async with serving((UNARY, handler)) as (server, address), await ttrpc.connect(address) as client:
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await entered.wait()
        ending = asyncio.create_task(server.shutdown(grace_s=5))
        await asyncio.sleep(0.02)
        with pytest.raises(StatusError, match="UNAVAILABLE: the server is shutting down"):
            await client.unary(UNARY, HELLO)
        gate.set()
        assert await call == HELLO
        await ending
        await client.closed.wait()


async def test_shutting_down_lets_a_stream_send_its_last_message() -> None:
    gate = asyncio.Event()

    async def handler(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        yield request
        await gate.wait()
        yield BytesValue(value=b"last")

    async with serving((SERVER, handler)) as (server, address), await ttrpc.connect(address) as client:
        stream = client.server_stream(SERVER, HELLO)
        await anext(stream)
        ending = asyncio.create_task(server.shutdown(grace_s=5))
        await asyncio.sleep(0)
        gate.set()
        assert [message.value async for message in stream] == [b"last"]
        await ending


async def test_after_its_grace_a_shutdown_answers_what_is_left_and_cancels_it() -> None:
    handler = Cancelled()
    async with serving((UNARY, handler)) as (server, address), await ttrpc.connect(address) as client:
        call = asyncio.create_task(client.unary(UNARY, HELLO))
        await until(lambda: handler.started == 1)
        await server.shutdown(grace_s=0.02)
        with pytest.raises(StatusError) as caught:
            await call
        assert (type(caught.value), caught.value.code) == (StatusError, Code.UNAVAILABLE)
        assert handler.count == 1


async def test_a_shutdown_ends_though_a_handler_ignores_it_and_a_client_reads_nothing() -> None:
    release = asyncio.Event()

    async def stubborn(request: BytesValue, context: CallContext) -> BytesValue:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return request

    async def flood(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        while True:
            yield BytesValue(value=bytes(100_000))

    async with serving((UNARY, stubborn), (SERVER, flood)) as (server, address), await Raw.to(address) as raw:
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        raw.send((1, REQUEST, 0, request(UNARY, b"no")), (3, REQUEST, REMOTE_CLOSED, request(SERVER)))
        await until(lambda: any(not connection.writable for connection in server._connections))
        async with asyncio.timeout(5):
            await server.shutdown(grace_s=0.01)
        assert server._connections == set()
        release.set()


async def test_idle_connections_end_at_once_and_a_second_shutdown_and_serve_are_told() -> None:
    server = ttrpc.Server()
    server.add(UNARY, echo)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0ttrpc-test-idle-" + str(os.getpid()))
        listening.listen()
        task = asyncio.create_task(server.serve(listening))
        client = await ttrpc.connect("\0ttrpc-test-idle-" + str(os.getpid()))
        assert await client.unary(UNARY, HELLO) == HELLO
        await asyncio.gather(server.shutdown(), server.shutdown())
        await task
        await client.closed.wait()
        assert listening.fileno() == -1
    with pytest.raises(RuntimeError, match="has been shut down"):
        await server.serve(socket.socket())
    with pytest.raises(RuntimeError, match="has been shut down"):
        await server.serve_connection(None)  # type: ignore[arg-type]
    await client.close()


async def test_cancelling_serve_stops_accepting_and_keeps_connections() -> None:
    server = ttrpc.Server()
    server.add(UNARY, echo)
    address = "\0ttrpc-test-cancel-" + str(os.getpid())
    task = asyncio.create_task(server.serve(ttrpc.listen(address)))
    client = await ttrpc.connect(address)
    assert await client.unary(UNARY, HELLO) == HELLO
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await client.unary(UNARY, HELLO) == HELLO
    with pytest.raises(ConnectionRefusedError):
        await ttrpc.connect(address)
    await server.shutdown()
    await client.close()


async def test_a_server_serves_several_sockets_that_it_is_given(tmp_path: Path) -> None:
    server = ttrpc.Server()
    server.add(UNARY, echo)
    sockets = [ttrpc.listen(tmp_path / name) for name in "ab"]
    tasks = [asyncio.create_task(server.serve(listening)) for listening in sockets]
    for name in "ab":
        async with await ttrpc.connect(f"unix://{tmp_path / name}") as client:
            assert await client.unary(UNARY, HELLO) == HELLO
    await server.shutdown()
    await asyncio.gather(*tasks)


async def test_methods_are_added_by_name_and_by_service() -> None:
    class Two(ttrpc.Service):
        ttrpc_methods = ((UNARY, "one"),)

        async def one(self, request: BytesValue, context: CallContext) -> BytesValue:
            return request

    async def stream(request: BytesValue, context: CallContext) -> AsyncIterator[BytesValue]:
        yield request
        yield request

    async with serving() as (server, address), await ttrpc.connect(address) as client:
        server.register(Two())
        server.add_method("raw.Raw", "Unary", ttrpc.Shape.SERVER_STREAM, BytesValue, BytesValue, stream)
        with pytest.raises(ValueError, match="registered already"):
            server.register(Two())
        both = ttrpc.Method("raw.Raw", "Unary", ttrpc.Shape.SERVER_STREAM, BytesValue, BytesValue)
        assert await client.unary(UNARY, HELLO) == HELLO
        assert [message async for message in client.server_stream(both, HELLO)] == [HELLO, HELLO]
