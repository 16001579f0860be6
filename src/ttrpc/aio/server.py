"""A ttrpc server: methods, sockets that it was given, connections, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from ttrpc.aio.context import CallContext
from ttrpc.aio.peers import Peer, PeerPolicy, peer_of
from ttrpc.aio.serving import ServerConnection
from ttrpc.aio.transport import Pump, Transport
from ttrpc.frames import FrameReader
from ttrpc.inbox import InboxLimits
from ttrpc.method import Handler, Method, Route, Routes, Service, Shape
from ttrpc.server_calls import CALLS_MAX, ServerCalls

logger = logging.getLogger("ttrpc")

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

UnaryNext = Callable[[Any, CallContext], Awaitable[Any]]
UnaryInterceptor = Callable[[Any, CallContext, UnaryNext], Awaitable[Any]]
"""async (request, context, proceed) -> response, where `await proceed(request, context)` goes on. Also for client streams,
whose request is the stream of them."""
StreamNext = Callable[[Any, CallContext], AsyncIterator[Any]]
StreamInterceptor = Callable[[Any, CallContext, StreamNext], AsyncIterator[Any]]
"""(request or requests, context, proceed) -> async iterator of responses."""

CONNECTIONS_MAX: Final = 1024
ACCEPT_RETRY_S: Final = 0.1
ABANDON_S: Final = 1.0
"""After its grace a shutdown waits this long for cancelled handlers and for peers to take their last answers."""
_NO_RESOURCES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


@dataclass(slots=True)
class _Listener:
    socket: socket.socket
    task: asyncio.Task[None]


class Server:
    """Serves methods on any number of sockets and transports.

    Args:
        max_concurrent_calls: per connection; the next one is answered RESOURCE_EXHAUSTED.
        max_connections: the next one waits in the socket's backlog.
        allow: which peers of listening sockets are talked to; the others are closed before a byte is read.
        unary_interceptors: around every handler with one response, the first is the outermost.
        stream_interceptors: around every handler that streams responses.
        inbox: the bounds of what a client has streamed and a handler has not read.
    """

    def __init__(
        self,
        *,
        max_concurrent_calls: int = CALLS_MAX,
        max_connections: int = CONNECTIONS_MAX,
        allow: PeerPolicy | None = None,
        unary_interceptors: Sequence[UnaryInterceptor] = (),
        stream_interceptors: Sequence[StreamInterceptor] = (),
        inbox: InboxLimits | None = None,
    ) -> None:
        self._routes = Routes()
        self._calls_max = max_concurrent_calls
        self._allow = PeerPolicy.same_user_or_root() if allow is None else allow
        self._unary_interceptors = tuple(unary_interceptors)
        self._stream_interceptors = tuple(stream_interceptors)
        self._inbox = inbox or InboxLimits()
        self._connections: set[ServerConnection] = set()
        self.connections_taken = 0
        """How many there were, since it began, from peers that are allowed."""
        self._room = asyncio.Semaphore(max_connections)
        self._listeners: list[_Listener] = []
        self._shutting_down = False
        self._changed = asyncio.Event()

    # Methods.

    def register(self, service: Service) -> None:
        """Serve every method of a generated service class.

        Raises:
            ValueError: one of its methods is registered already.
        """
        for method, attribute in service.ttrpc_methods:
            self.add(method, getattr(service, attribute))

    def add_method(
        self,
        service: str,
        name: str,
        shape: Shape,
        request_type: type[Message],
        response_type: type[Message],
        handler: Handler,
    ) -> None:
        """Serve one method by its names; also the second shape of a name: unary and server-streaming methods of one
        name are told apart by what their clients send.

        Raises:
            ValueError: the name is taken, in this shape or in one that cannot be told from it.
        """
        self.add(Method(service, name, shape, request_type, response_type), handler)

    def add(self, method: Method[Any, Any], handler: Handler) -> None:
        """Serve one method."""
        interceptors: Sequence[Callable[[Any, CallContext, Any], Any]] = self._unary_interceptors
        if method.shape.server_streams:
            interceptors = self._stream_interceptors
        for interceptor in reversed(interceptors):
            handler = _around(interceptor, handler)
        self._routes.add(Route(method, handler))

    # Serving.

    async def serve(self, listening: socket.socket) -> None:
        """Accept connections until `shutdown`. Takes the socket over, and closes it in the end.

        Cancelling it stops accepting; connections that are there live on until `shutdown`.

        Raises:
            RuntimeError: the server has been shut down.
        """
        if self._shutting_down:
            raise RuntimeError("the server has been shut down: make another")
        listening.setblocking(False)  # noqa: FBT003
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._task_accept(listening), name="ttrpc-accept")
        listener = _Listener(listening, task)
        self._listeners.append(listener)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
            self._listeners.remove(listener)
            listening.close()
            self._notify()
        if not task.cancelled():
            task.result()
        await self._until(lambda: not self._shutting_down or not self._connections)

    async def _task_accept(self, listening: socket.socket) -> None:
        """Its exceptions come out of `serve`."""
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                self._room.release()
                if error.errno in _NO_RESOURCES:
                    logger.warning("cannot accept a connection now: %s", error)
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                raise
            except BaseException:
                self._room.release()
                raise
            await self._take(accepted)

    async def _take(self, accepted: socket.socket) -> None:
        """Check who it is, then serve it. A peer that is not allowed is closed without having been read."""
        try:
            peer = peer_of(accepted)
            if not self._allow.allows(peer):
                logger.warning("refused %s", peer)
                accepted.close()
                self._room.release()
                return
            accepted.setblocking(False)  # noqa: FBT003
            loop = asyncio.get_running_loop()
            connection = self._connection(peer, self._on_lost_socket)
            self._connections.add(connection)
            await loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError as error:
            logger.warning("a connection ended before it began: %s", error)
            accepted.close()
            self._room.release()

    def _connection(self, peer: Peer | None, on_lost: Callable[[ServerConnection], None]) -> ServerConnection:
        self.connections_taken += 1
        calls = ServerCalls(self._routes, calls_max=self._calls_max, inbox_limits=self._inbox)
        loop = asyncio.get_running_loop()
        return ServerConnection(loop, calls, FrameReader(), self._inbox, peer=peer, on_lost=on_lost)

    def _on_lost(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)
        self._notify()

    def _on_lost_socket(self, connection: ServerConnection) -> None:
        self._room.release()
        self._on_lost(connection)

    async def serve_connection(self, transport: Transport, *, peer: Peer | None = None) -> None:
        """Serve one connection over any byte transport, until it ends. `allow` is not asked: the caller knows who it is.

        Cancelling it cuts the connection.

        Raises:
            RuntimeError: the server has been shut down.
        """
        if self._shutting_down:
            raise RuntimeError("the server has been shut down: make another")
        connection = self._connection(peer, self._on_lost)
        self._connections.add(connection)
        pump = Pump(transport, connection)
        try:
            await self._until(lambda: connection not in self._connections)
        except BaseException:
            pump.abort()
            raise

    # The end.

    async def shutdown(self, grace_s: float = 5.0) -> None:
        """Stop accepting, let open calls and streams end for at most `grace_s`, then answer UNAVAILABLE and close.

        A connection ends when its last open call has been answered; calls that arrive meanwhile are answered
        UNAVAILABLE. Handlers that are still running after `grace_s` are cancelled, and waited for for `ABANDON_S`.
        Calling it again waits for the same end. Returns with every connection closed.
        """
        self._shutting_down = True
        for listener in self._listeners:
            listener.task.cancel()
        for connection in list(self._connections):
            connection.drain()
        self._notify()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._until(lambda: not self._connections and not self._listeners)
                return
        tasks = {task for connection in self._connections for task in connection.tasks}
        tasks.discard(asyncio.current_task())
        for connection in list(self._connections):
            connection.abandon()
        if tasks:
            await asyncio.wait(tasks, timeout=ABANDON_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABANDON_S):
                await self._until(lambda: not self._connections)
        for connection in list(self._connections):
            connection.cut()
        await self._until(lambda: not self._connections and not self._listeners)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


def _around(interceptor: Callable[[Any, CallContext, Any], Any], handler: Handler) -> Handler:
    def intercepted(request: Any, context: CallContext) -> Any:
        return interceptor(request, context, handler)

    return intercepted
