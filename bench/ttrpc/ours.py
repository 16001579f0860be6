"""Our own library, as server and as client: python -m bench.ttrpc.ours LOOP serve|KIND SOCKET [SECONDS]."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value

import ttrpc
from bench.ttrpc.measures import TIMEOUT_S, measure

ECHO = ttrpc.Method("interop.Echo", "Echo", ttrpc.Shape.UNARY, BytesValue, BytesValue)
BLAST = ttrpc.Method("interop.Echo", "Blast", ttrpc.Shape.SERVER_STREAM, UInt64Value, BytesValue)


async def echo(request: BytesValue, _context: ttrpc.CallContext) -> BytesValue:
    return request


async def blast(request: UInt64Value, _context: ttrpc.CallContext) -> AsyncIterator[BytesValue]:
    message = BytesValue(value=bytes(request.value & 0xFFFFFFFF))
    for _ in range(request.value >> 32):
        yield message


async def serve(path: str) -> None:
    server = ttrpc.Server()
    server.add(ECHO, echo)
    server.add(BLAST, blast)
    listening = ttrpc.listen(path)
    print("listening", flush=True)
    await server.serve(listening)


async def client(kind: str, path: str, seconds: float) -> None:
    async with await ttrpc.connect(path) as connection:
        request = BytesValue(value=bytes(64))

        def call() -> Awaitable[Any]:
            return connection.unary(ECHO, request, timeout_s=TIMEOUT_S)

        def stream(messages: int, size: int) -> AsyncIterator[Any]:
            return connection.server_stream(BLAST, UInt64Value(value=messages << 32 | size))

        await measure(kind, seconds, call, stream)


def main() -> None:
    loop, what, path = sys.argv[1:4]
    work = serve(path) if what == "serve" else client(what, path, float(sys.argv[4]))
    factory = None
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415  # the other loop is measured without it

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)


if __name__ == "__main__":
    main()
