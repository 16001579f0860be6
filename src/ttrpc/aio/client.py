"""A ttrpc client: any number of calls at a time over one connection."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from google.protobuf.message import Message

from ttrpc.aio.addresses import socket_path
from ttrpc.aio.connection import Connection
from ttrpc.aio.streams import BidiStream, ClientStream, Pending, ResponseStream, decode_response
from ttrpc.aio.transport import Pump, Transport
from ttrpc.aio.waiter import Waiter
from ttrpc.client_calls import ClientCall, ClientCalls
from ttrpc.codes import Code
from ttrpc.errors import ConnectionClosed, ProtocolViolation, StatusError
from ttrpc.frames import Frame, FrameReader
from ttrpc.inbox import InboxLimits
from ttrpc.method import Method
from ttrpc.status import DEADLINE_MESSAGE

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
CONNECT_AGAIN_S: Final = 0.01
CLOSE_S: Final = 1.0
AnyMetadata = Mapping[str, str] | Mapping[str, str | Sequence[str]]


class ClientConnection(Connection):
    """The asyncio side of a client's connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: InboxLimits) -> None:
        self.calls = ClientCalls(inbox_limits=limits)
        super().__init__(loop, self.calls, FrameReader(), limits)
        self.closed = asyncio.Event()
        self._reason: str | None = None

    def _receive(self, frames: list[Frame]) -> None:
        changed = self.calls.receive(frames)
        for index, call in enumerate(changed):
            waiter = call.handle.waiter
            if waiter is not None:
                try:
                    waiter.resume_now()
                except BaseException:
                    # KeyboardInterrupt or SystemExit of the resumed task: the others must not be forgotten.
                    _resume_soon(changed[index + 1 :])
                    raise

    def _expire(self, call: Any) -> None:
        call.handle.bucket = None
        self.calls.forget(call, StatusError(Code.DEADLINE_EXCEEDED, DEADLINE_MESSAGE))
        _resume_soon([call])
        self.balance_reading()

    def _give_up(self, call: Any) -> None:
        self.calls.give_up(call)
        _resume_soon([call])

    def cut(self, error: Exception | None = None) -> None:
        if self._reason is None and isinstance(error, ProtocolViolation):
            self._reason = f"the server broke the protocol: {error}"
        super().cut(error)

    def close(self) -> None:
        """Every open call ends now; what was written is still sent."""
        self._fail("the connection was closed by this client")
        super().close()

    def _ended(self, error: Exception | None) -> None:
        self._fail(
            self._reason
            or ("the server closed the connection" if error is None else f"the connection broke: {error}")
        )
        self.closed.set()

    def _fail(self, reason: str) -> None:
        _resume_soon(self.calls.close(ConnectionClosed(reason)))

    # Calls.

    def begin(
        self,
        method: Method[Any, Any],
        payload: bytes,
        timeout_s: float | None,
        metadata: AnyMetadata | None,
    ) -> ClientCall:
        """Open a call and write its Request.

        Raises:
            StatusError: see `ClientCalls.open_call`; DEADLINE_EXCEEDED, no time is left.
        """
        if timeout_s is not None:
            if timeout_s <= 0:
                raise StatusError(Code.DEADLINE_EXCEEDED, DEADLINE_MESSAGE)
            if timeout_s == math.inf:
                timeout_s = None
        calls = self.calls
        call = calls.open_call(method, payload, timeout_s, metadata)
        call.handle = pending = Pending()
        if timeout_s is not None:
            pending.bucket = self.add_deadline(call, timeout_s)
        self.flush_soon(alone=len(calls.open) == 1)
        return call

    async def wait(self, call: ClientCall) -> None:
        """Wait until something has changed about an open call.

        Raises:
            RuntimeError: another task waits for it.
        """
        pending: Pending = call.handle
        if pending.waiter is not None:
            raise RuntimeError("a call can be waited for by one task at a time only")
        pending.waiter = waiter = Waiter(self._loop)
        try:
            await waiter
        finally:
            pending.waiter = None
            if call.done:
                self.ended(call)

    async def room(self, timeout_s: float | None) -> float | None:
        """Wait until the server keeps up; how much of `timeout_s` is left then.

        Raises:
            StatusError: DEADLINE_EXCEEDED.
        """
        start_s = self._loop.time()
        try:
            async with asyncio.timeout(timeout_s):
                await self.until_writable()
        except TimeoutError:
            raise StatusError(Code.DEADLINE_EXCEEDED, DEADLINE_MESSAGE) from None
        return None if timeout_s is None else timeout_s - (self._loop.time() - start_s)

    def drop_soon(self, call: ClientCall) -> None:
        """The stream's object is gone, so nobody will read it or end it. May be called from any thread."""
        if not self.lost and not self._loop.is_closed():
            error = StatusError(Code.CANCELLED, "the stream was dropped")
            self._loop.call_soon_threadsafe(self.cancel, call, error)

    def ended(self, call: ClientCall) -> None:
        """A call has ended: its deadline is not needed any more."""
        pending: Pending = call.handle
        if pending.bucket is not None:
            self.deadlines.discard(call, pending.bucket)
            pending.bucket = None

    def cancel(self, call: ClientCall, error: StatusError) -> None:
        """End a call on this side; whoever waits for it gets `error`."""
        if not call.done:
            self.calls.forget(call, error)
            _resume_soon([call])
            self.balance_reading()
        self.ended(call)


def _resume_soon(calls: Sequence[ClientCall]) -> None:
    for call in calls:
        if call.handle is not None and call.handle.waiter is not None:
            call.handle.waiter.resume_soon()


class Client:
    """Calls over one connection. When that ends, every call raises `ConnectionClosed`: make another client.

    Generated stubs take one of these. Calls may be made from any number of tasks of its loop; cancelling one harms no
    other.
    """

    def __init__(self, connection: ClientConnection) -> None:
        """Use `connect` or `Client.over`."""
        self._connection = connection
        self.closed = connection.closed
        """Set when the connection has ended, from whichever side."""

    @classmethod
    def over(cls, transport: Transport, *, inbox: InboxLimits | None = None) -> Client:
        """A client over any byte transport, which it takes over. Needs a running loop."""
        connection = ClientConnection(asyncio.get_running_loop(), inbox or InboxLimits())
        Pump(transport, connection)
        return cls(connection)

    async def unary(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        metadata: AnyMetadata | None = None,
    ) -> ResponseT:
        """One request, one response.

        Args:
            timeout_s: also told to the server. None: for ever.
            metadata: strings beside the request; keys become lower case.

        Raises:
            StatusError: what the server answered; DEADLINE_EXCEEDED; RESOURCE_EXHAUSTED, a message above the limit.
            ConnectionClosed: the connection ended first; whether the call was carried out is not known.
        """
        connection = self._connection
        payload = request.SerializeToString()
        if not connection.writable:
            timeout_s = await connection.room(timeout_s)
        call = connection.begin(method, payload, timeout_s, metadata)
        pending: Pending = call.handle
        pending.waiter = waiter = connection.new_waiter()
        try:
            await waiter
        except BaseException:
            connection.cancel(call, StatusError(Code.CANCELLED, "the call was cancelled by its caller"))
            raise
        if pending.bucket is not None:
            connection.ended(call)
        if call.error is not None:
            raise call.error
        return decode_response(method, call.payload)

    def server_stream(
        self,
        method: Method[Any, ResponseT],
        request: Message,
        *,
        timeout_s: float | None = None,
        metadata: AnyMetadata | None = None,
    ) -> ResponseStream[ResponseT]:
        """One request, many responses. The call is on its way when this returns.

        Raises:
            StatusError: as `unary`, for what is known before the server answers.
        """
        call = self._connection.begin(method, request.SerializeToString(), timeout_s, metadata)
        return ResponseStream(self._connection, call, method)

    def client_stream(
        self,
        method: Method[RequestT, ResponseT],
        *,
        timeout_s: float | None = None,
        metadata: AnyMetadata | None = None,
    ) -> ClientStream[RequestT, ResponseT]:
        """Many requests, one response."""
        return ClientStream(
            self._connection, self._connection.begin(method, b"", timeout_s, metadata), method
        )

    def bidi_stream(
        self,
        method: Method[RequestT, ResponseT],
        *,
        timeout_s: float | None = None,
        metadata: AnyMetadata | None = None,
    ) -> BidiStream[RequestT, ResponseT]:
        """Many requests, many responses."""
        return BidiStream(self._connection, self._connection.begin(method, b"", timeout_s, metadata), method)

    async def close(self) -> None:
        """End the connection. Open calls raise `ConnectionClosed`. Calling it again does nothing.

        A server that does not take what was written within `CLOSE_S` does not get it any more.
        """
        self._connection.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.closed.wait()
        except TimeoutError:
            self._connection.cut()
            await self.closed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        await self.close()


async def _connect_unix(connecting: socket.socket, path: str) -> None:
    """Connect, or try again while the server's backlog is full.

    A Unix socket says EAGAIN then and does not go on by itself; `loop.sock_connect` would take it for connected.
    """
    while True:
        try:
            connecting.connect(path)
        except BlockingIOError:
            await asyncio.sleep(CONNECT_AGAIN_S)
        else:
            return


async def connect(
    address: str | os.PathLike[str] | socket.socket,
    *,
    timeout_s: float | None = 5.0,
    inbox: InboxLimits | None = None,
) -> Client:
    """A client of the server at a Unix socket: "/path", "unix:///path", "\\0abstract", or a connected socket.

    Args:
        timeout_s: for connecting only. None: for as long as the kernel takes.
        inbox: the bounds of what a server has streamed and nobody has read.

    Raises:
        OSError: nobody listens there, or whatever connect(2) says.
        TimeoutError: the server's backlog stayed full.
        ValueError: this is no address.
    """
    loop = asyncio.get_running_loop()
    connection = ClientConnection(loop, inbox or InboxLimits())
    connected = (
        address if isinstance(address, socket.socket) else socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    )
    try:
        connected.setblocking(False)  # noqa: FBT003
        if not isinstance(address, socket.socket):
            async with asyncio.timeout(timeout_s):
                await _connect_unix(connected, socket_path(address))
        if connected.family == socket.AF_UNIX:
            await loop.create_unix_connection(lambda: connection, sock=connected)
        else:
            await loop.create_connection(lambda: connection, sock=connected)
    except BaseException:
        connected.close()
        raise
    return Client(connection)
