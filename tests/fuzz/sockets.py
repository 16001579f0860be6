"""Garbage over real sockets into a real server: no unhandled exception, no unbounded memory, other connections unharmed."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import resource
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from google.protobuf.wrappers_pb2 import BytesValue

import ttrpc
from tests.fuzz.targets import IDS, KINDS, METHODS, Steps, body
from ttrpc import Shape
from ttrpc.frames import encode

RSS_GROWTH_MIB_MAX: Final = 64
HELLO: Final = BytesValue(value=b"hello")
HEALTHY: Final = ttrpc.Method("s", "Healthy", Shape.UNARY, BytesValue, BytesValue)


class Unharmed(AssertionError):
    """A rule of this file does not hold."""


async def unary(request: BytesValue, context: ttrpc.CallContext) -> BytesValue:
    if len(request.value) % 2:
        await asyncio.sleep(0)
    return request


async def server_stream(request: BytesValue, context: ttrpc.CallContext) -> AsyncIterator[BytesValue]:
    for _ in range(20):
        yield BytesValue(value=bytes(3000))


async def client_stream(requests: ttrpc.RequestStream[BytesValue], context: ttrpc.CallContext) -> BytesValue:
    async for request in requests:
        if len(request.value) > 10:
            await asyncio.Event().wait()
    return HELLO


async def bidi(
    requests: ttrpc.RequestStream[BytesValue], context: ttrpc.CallContext
) -> AsyncIterator[BytesValue]:
    async for request in requests:
        yield request


def stream_of(data: bytes, draw: random.Random) -> bytes:
    """The bytes that an input puts on the wire; now and then cut or with garbage in it."""
    steps = Steps(data)
    out = bytearray()
    for opcode in steps:
        if opcode % 16 < 8:
            kind = steps.pick(KINDS)
            out += encode(steps.pick(IDS), kind, steps.byte() & 7, body(steps, kind))
    if draw.random() < 0.2:
        del out[draw.randrange(len(out) + 1) :]
    if draw.random() < 0.1:
        out += draw.randbytes(draw.randrange(40))
    return bytes(out)


async def attack(inputs: Sequence[bytes], seed: int) -> int:
    """Send each of them over a connection of its own; how many.

    Raises:
        Unharmed: something was harmed; the message names the input.
    """
    draw = random.Random(seed)
    problems: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: problems.append(str(context)))
    listener = logging.Handler()
    listener.emit = lambda record: problems.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ttrpc").addHandler(listener)
    server = ttrpc.Server(max_concurrent_calls=8, inbox=ttrpc.InboxLimits(messages_max=8, patience_s=0.01))
    handlers: dict[Shape, Any] = dict(zip(Shape, (unary, server_stream, client_stream, bidi), strict=True))
    for shape, method in METHODS.items():
        server.add(method, handlers[shape])
    server.add(HEALTHY, unary)
    address = f"\0ttrpc-fuzz-{id(server)}"
    serving = asyncio.create_task(server.serve(ttrpc.listen(address)))
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with await ttrpc.connect(address) as healthy:
        for number, data in enumerate(inputs):
            reader, writer = await asyncio.open_unix_connection(address)
            writer.write(stream_of(data, draw))
            if number % 3 == 0:
                writer.write_eof()
            await healthy.unary(HEALTHY, HELLO, timeout_s=10)
            if number % 2:
                await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=0.001)
            writer.close()
            await healthy.unary(HEALTHY, HELLO, timeout_s=10)
            if problems:
                raise Unharmed(f"{problems[0]}; input {data.hex()}")
    await server.shutdown(grace_s=0)
    await serving
    gc.collect()
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_before) / 1024
    if problems or grown_mib > RSS_GROWTH_MIB_MAX or server._connections:
        raise Unharmed(
            f"{problems[:1]}, {grown_mib:.0f} MiB more, {len(server._connections)} connections left"
        )
    logging.getLogger("ttrpc").removeHandler(listener)
    return len(inputs)
