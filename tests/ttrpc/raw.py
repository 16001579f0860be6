"""A peer that speaks frames and nothing else, and the plainest server to try things on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

from google.protobuf.wrappers_pb2 import BytesValue

import ttrpc
from ttrpc import Code, Method, Shape
from ttrpc.frames import RESPONSE, Frame, FrameReader, encode
from ttrpc.wire.ttrpc_pb2 import Request, Response

_numbers = itertools.count()

UNARY = Method("raw.Raw", "Unary", Shape.UNARY, BytesValue, BytesValue)
SERVER = Method("raw.Raw", "Server", Shape.SERVER_STREAM, BytesValue, BytesValue)
CLIENT = Method("raw.Raw", "Client", Shape.CLIENT_STREAM, BytesValue, BytesValue)
BIDI = Method("raw.Raw", "Bidi", Shape.BIDI, BytesValue, BytesValue)


def abstract() -> str:
    """An address that nobody else uses."""
    return f"\0ttrpc-test-{os.getpid()}-{next(_numbers)}"


def request(method: Method[Any, Any], value: bytes | None = None, **fields: Any) -> bytes:
    payload = b"" if value is None else BytesValue(value=value).SerializeToString()
    return Request(service=method.service, method=method.name, payload=payload, **fields).SerializeToString()


def value(data: bytes) -> bytes:
    return BytesValue(value=data).SerializeToString()


class Raw:
    """One end of a connection, frame by frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._frames = FrameReader()
        self._ready: list[Frame] = []

    @classmethod
    async def to(cls, address: str) -> Self:
        return cls(*await asyncio.open_unix_connection(address))

    def send(self, *frames: Frame) -> None:
        self.writer.write(b"".join(encode(*frame) for frame in frames))

    async def frame(self) -> Frame:
        async with asyncio.timeout(5):
            while not self._ready:
                data = await self.reader.read(1 << 16)
                if not data:
                    raise EOFError
                self._ready += self._frames.feed(data)
        stream, kind, flags, data = self._ready.pop(0)
        return stream, kind, flags, bytes(data)

    async def error(self) -> tuple[int, Code, str]:
        """An error Response."""
        stream, kind, _, data = await self.frame()
        assert kind == RESPONSE
        status = Response.FromString(data).status  # type: ignore[arg-type]
        return stream, Code.of(status.code), status.message

    async def at_end(self) -> bool:
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                return not self._ready and await self.reader.read(1) == b""
        return True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()


@contextlib.asynccontextmanager
async def serving(
    *handlers: tuple[Method[Any, Any], Callable[..., Any]], **options: Any
) -> AsyncIterator[tuple[ttrpc.Server, str]]:
    """A server and its address; shut down without grace in the end."""
    address = abstract()
    server = ttrpc.Server(**options)
    for method, handler in handlers:
        server.add(method, handler)
    task = asyncio.create_task(server.serve(ttrpc.listen(address)))
    try:
        yield server, address
    finally:
        async with asyncio.timeout(10):
            await server.shutdown(grace_s=0)
            await task


@contextlib.asynccontextmanager
async def served_by_hand(**options: Any) -> AsyncIterator[tuple[ttrpc.Client, Raw]]:
    """A client whose server is the test."""
    address = abstract()
    accepted: asyncio.Queue[Raw] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(Raw(reader, writer))

    server = await asyncio.start_unix_server(accept, address)
    async with server, await ttrpc.connect(address, **options) as client, await accepted.get() as raw:
        yield client, raw


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def echo(request: BytesValue, context: ttrpc.CallContext) -> BytesValue:
    return request
