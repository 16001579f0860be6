"""grpcio's asyncio API, as server and as client: python -m bench.ttrpc.grpcio_aio - serve|KIND SOCKET [SECONDS]."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value

from bench.ttrpc.measures import TIMEOUT_S, measure


async def echo(request: BytesValue, _context: Any) -> BytesValue:
    return request


async def blast(request: UInt64Value, _context: Any) -> AsyncIterator[BytesValue]:
    message = BytesValue(value=bytes(request.value & 0xFFFFFFFF))
    for _ in range(request.value >> 32):
        yield message


async def serve(path: str) -> None:
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(
            echo, request_deserializer=BytesValue.FromString, response_serializer=BytesValue.SerializeToString
        ),
        "Blast": grpc.unary_stream_rpc_method_handler(
            blast,
            request_deserializer=UInt64Value.FromString,
            response_serializer=BytesValue.SerializeToString,
        ),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("interop.Echo", handlers),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("listening", flush=True)
    await server.wait_for_termination()


async def client(kind: str, path: str, seconds: float) -> None:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        unary = channel.unary_unary(
            "/interop.Echo/Echo",
            request_serializer=BytesValue.SerializeToString,
            response_deserializer=BytesValue.FromString,
        )
        streaming = channel.unary_stream(
            "/interop.Echo/Blast",
            request_serializer=UInt64Value.SerializeToString,
            response_deserializer=BytesValue.FromString,
        )
        request = BytesValue(value=bytes(64))

        def call() -> Awaitable[Any]:
            answer: Awaitable[Any] = unary(request, timeout=TIMEOUT_S)
            return answer

        def stream(messages: int, size: int) -> AsyncIterator[Any]:
            messages_of: AsyncIterator[Any] = aiter(streaming(UInt64Value(value=messages << 32 | size)))
            return messages_of

        await measure(kind, seconds, call, stream)


def main() -> None:
    _, what, path = sys.argv[1:4]
    asyncio.run(serve(path) if what == "serve" else client(what, path, float(sys.argv[4])))


if __name__ == "__main__":
    main()
