"""interop.Echo in Python: what tests/interop/go/server.go serves, and a little more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue, Int32Value, Int64Value, StringValue, UInt64Value

import ttrpc
from ttrpc import CallContext, Code, Method, Shape, StatusError

SERVICE = "interop.Echo"


def method(name: str, shape: Shape, request: Any, response: Any) -> Method[Any, Any]:
    return Method(SERVICE, name, shape, request, response)


ECHO = method("Echo", Shape.UNARY, BytesValue, BytesValue)
FAIL = method("Fail", Shape.UNARY, Int32Value, Empty)
METADATA = method("Metadata", Shape.UNARY, StringValue, StringValue)
TIME_LEFT = method("TimeLeft", Shape.UNARY, Empty, Int64Value)
SLEEP = method("Sleep", Shape.UNARY, Int64Value, Empty)
CANCELLED = method("Cancelled", Shape.UNARY, Empty, Int64Value)
BIG = method("Big", Shape.UNARY, Int64Value, BytesValue)
SINK = method("Sink", Shape.UNARY, BytesValue, Empty)
COUNT = method("Count", Shape.SERVER_STREAM, Int64Value, Int64Value)
COUNT_FAIL = method("CountFail", Shape.SERVER_STREAM, Int64Value, Int64Value)
BLAST = method("Blast", Shape.SERVER_STREAM, UInt64Value, BytesValue)
FOREVER = method("Forever", Shape.SERVER_STREAM, Empty, Int64Value)
SUM = method("Sum", Shape.CLIENT_STREAM, Int64Value, Int64Value)
REFUSE = method("Refuse", Shape.CLIENT_STREAM, Int64Value, Int64Value)
CHAT = method("Chat", Shape.BIDI, BytesValue, BytesValue)
BOTH_UNARY = method("Both", Shape.UNARY, Empty, StringValue)
BOTH_STREAM = method("Both", Shape.SERVER_STREAM, Empty, StringValue)
CUT = method("Cut", Shape.UNARY, Empty, Empty)
SHUT_DOWN = method("ShutDown", Shape.UNARY, Empty, Empty)


class EchoServer:
    """One server of it, on its own socket."""

    def __init__(self) -> None:
        self.server = ttrpc.Server()
        self.cancelled = 0
        self.shutdown: asyncio.Task[None] | None = None
        for described, handler in (
            (ECHO, self.echo),
            (FAIL, self.fail),
            (METADATA, self.metadata),
            (TIME_LEFT, self.time_left),
            (SLEEP, self.sleep),
            (CANCELLED, self.count_cancelled),
            (BIG, self.big),
            (SINK, self.sink),
            (COUNT, self.count),
            (COUNT_FAIL, self.count_fail),
            (BLAST, self.blast),
            (FOREVER, self.forever),
            (SUM, self.sum),
            (REFUSE, self.refuse),
            (CHAT, self.chat),
            (BOTH_UNARY, self.both_unary),
            (BOTH_STREAM, self.both_stream),
            (CUT, self.cut),
            (SHUT_DOWN, self.shut_down),
        ):
            self.server.add(described, handler)

    async def echo(self, request: BytesValue, context: CallContext) -> BytesValue:
        return request

    async def fail(self, request: Int32Value, context: CallContext) -> Empty:
        raise StatusError(request.value, f"code {request.value}", [StringValue(value="detail")])

    async def metadata(self, request: StringValue, context: CallContext) -> StringValue:
        return StringValue(value="|".join(context.metadata.all(request.value)))

    async def time_left(self, request: Empty, context: CallContext) -> Int64Value:
        return Int64Value(value=-1 if context.timeout_s is None else int(context.timeout_s * 1000))

    async def sleep(self, request: Int64Value, context: CallContext) -> Empty:
        try:
            await asyncio.sleep(request.value / 1000)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Empty()

    async def count_cancelled(self, request: Empty, context: CallContext) -> Int64Value:
        return Int64Value(value=self.cancelled)

    async def big(self, request: Int64Value, context: CallContext) -> BytesValue:
        return BytesValue(value=bytes(request.value))

    async def sink(self, request: BytesValue, context: CallContext) -> Empty:
        return Empty()

    async def count(self, request: Int64Value, context: CallContext) -> AsyncIterator[Int64Value]:
        for number in range(request.value):
            yield Int64Value(value=number)

    async def count_fail(self, request: Int64Value, context: CallContext) -> AsyncIterator[Int64Value]:
        for number in range(request.value):
            yield Int64Value(value=number)
        raise StatusError(Code.ABORTED, "after the last")

    async def blast(self, request: UInt64Value, context: CallContext) -> AsyncIterator[BytesValue]:
        for _ in range(request.value >> 32):
            yield BytesValue(value=bytes(request.value & 0xFFFFFFFF))

    async def forever(self, request: Empty, context: CallContext) -> AsyncIterator[Int64Value]:
        number = 0
        try:
            while True:
                yield Int64Value(value=number)
                number += 1
                await asyncio.sleep(0.001)
        finally:
            self.cancelled += 1

    async def sum(self, requests: ttrpc.RequestStream[Int64Value], context: CallContext) -> Int64Value:
        return Int64Value(value=sum([request.value async for request in requests]))

    async def refuse(self, requests: ttrpc.RequestStream[Int64Value], context: CallContext) -> Int64Value:
        async for _ in requests:
            break
        raise StatusError(Code.FAILED_PRECONDITION, "enough")

    async def chat(
        self, requests: ttrpc.RequestStream[BytesValue], context: CallContext
    ) -> AsyncIterator[BytesValue]:
        async for request in requests:
            yield request

    async def both_unary(self, request: Empty, context: CallContext) -> StringValue:
        return StringValue(value="unary")

    async def both_stream(self, request: Empty, context: CallContext) -> AsyncIterator[StringValue]:
        yield StringValue(value="stream")
        yield StringValue(value="of two")

    async def cut(self, request: Empty, context: CallContext) -> Empty:
        """Cuts every connection with this call and others in flight."""
        for connection in self.server._connections:
            connection.cut()
        await asyncio.sleep(10)
        return Empty()

    async def shut_down(self, request: Empty, context: CallContext) -> Empty:
        """Begins to shut down while this is the only call."""
        self.shutdown = asyncio.create_task(self.server.shutdown(grace_s=5))
        await asyncio.sleep(0.05)
        return Empty()
