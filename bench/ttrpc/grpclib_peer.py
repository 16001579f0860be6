"""grpclib, as server and as client: python -m bench.ttrpc.grpclib_peer - serve|KIND SOCKET [SECONDS]."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value
from grpclib.client import Channel, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.const import Cardinality, Handler
from grpclib.server import Server

from bench.ttrpc.measures import TIMEOUT_S, measure


class Service:
    async def echo(self, stream: Any) -> None:
        await stream.send_message(await stream.recv_message())

    async def blast(self, stream: Any) -> None:
        request = await stream.recv_message()
        message = BytesValue(value=bytes(request.value & 0xFFFFFFFF))
        for _ in range(request.value >> 32):
            await stream.send_message(message)

    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/interop.Echo/Echo": Handler(self.echo, Cardinality.UNARY_UNARY, BytesValue, BytesValue),
            "/interop.Echo/Blast": Handler(self.blast, Cardinality.UNARY_STREAM, UInt64Value, BytesValue),
        }


async def serve(path: str) -> None:
    server = Server([Service()])
    await server.start(path=path)
    print("listening", flush=True)
    await server.wait_closed()


async def client(kind: str, path: str, seconds: float) -> None:
    async with Channel(path=path) as channel:
        unary = UnaryUnaryMethod(channel, "/interop.Echo/Echo", BytesValue, BytesValue)
        streaming = UnaryStreamMethod(channel, "/interop.Echo/Blast", UInt64Value, BytesValue)
        request = BytesValue(value=bytes(64))

        def call() -> Awaitable[Any]:
            return unary(request, timeout=TIMEOUT_S)

        async def stream(messages: int, size: int) -> AsyncIterator[Any]:
            async with streaming.open() as opened:
                await opened.send_message(UInt64Value(value=messages << 32 | size), end=True)
                async for message in opened:
                    yield message

        await measure(kind, seconds, call, stream)


def main() -> None:
    _, what, path = sys.argv[1:4]
    asyncio.run(serve(path) if what == "serve" else client(what, path, float(sys.argv[4])))


if __name__ == "__main__":
    main()
