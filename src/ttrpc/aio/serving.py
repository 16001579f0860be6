"""One connection of a server: runs the handlers of the calls that the pure core has found in the frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from ttrpc.aio.connection import Connection
from ttrpc.aio.context import CallContext, RequestStream
from ttrpc.aio.eager import start_eagerly
from ttrpc.aio.peers import Peer
from ttrpc.codes import Code
from ttrpc.errors import StatusError
from ttrpc.frames import Frame, FrameReader
from ttrpc.inbox import InboxLimits
from ttrpc.method import Shape
from ttrpc.server_calls import Event, ServerCall, ServerCalls
from ttrpc.status import DEADLINE_MESSAGE, status_of


class Running:
    """The shell's side of one call."""

    __slots__ = ("bucket", "requests", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.bucket: int | None = None
        self.requests: RequestStream[Message] | None = None


class ServerConnection(Connection):
    """Serves one connection until it ends."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        calls: ServerCalls,
        reader: FrameReader,
        limits: InboxLimits,
        *,
        peer: Peer | None,
        on_lost: Callable[[ServerConnection], None],
    ) -> None:
        super().__init__(loop, calls, reader, limits)
        self.calls = calls
        self.peer = peer
        self._on_lost = on_lost
        self.tasks: set[asyncio.Task[None]] = set()
        """Handlers that are still running, also those whose call has ended."""

    # Frames.

    def _receive(self, frames: list[Frame]) -> None:
        for event, call in self.calls.receive(frames):
            if event is Event.STARTED:
                self._start(call)
            elif event is Event.READABLE:
                running: Running | None = call.handle
                if (
                    running is not None
                    and running.requests is not None
                    and running.requests.waiter is not None
                ):
                    running.requests.waiter.resume_now()
            else:
                self._cancel(call)

    def _start(self, call: ServerCall) -> None:
        if not call.open:
            return
        shape = call.route.method.shape
        if shape is Shape.UNARY:
            work = self._answer(call, call.request)
        else:
            call.handle = running = Running()
            given: Any = call.request
            if shape.client_streams:
                given = running.requests = RequestStream(call, self)
            work = self._stream(call, given) if shape.server_streams else self._answer(call, given)
        task = start_eagerly(self._loop, work)
        if task is not None:
            self._watch(call, task)

    def _watch(self, call: ServerCall, task: asyncio.Task[None]) -> None:
        """The handler has not finished at once."""
        running: Running | None = call.handle
        if running is None:
            call.handle = running = Running()
        running.task = task
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        timeout_s = call.timeout_s
        if timeout_s is not None and call.open:
            running.bucket = self.add_deadline(call, timeout_s)

    # Handlers. Neither raises, but for KeyboardInterrupt and SystemExit.

    async def _answer(self, call: ServerCall, given: Any) -> None:
        """Run the handler of a call with one response."""
        try:
            response = await call.route.handler(given, CallContext(call, self.peer))
            call.respond(response.SerializeToString())
        except BaseException as error:  # noqa: BLE001  # the one place where a handler's exception becomes a status
            self._failed(call, error)
        self._done(call)

    async def _stream(self, call: ServerCall, given: Any) -> None:
        """Run the handler of a call with many responses."""
        try:
            responses = call.route.handler(given, CallContext(call, self.peer))
            try:
                await self._send_all(call, responses)
            finally:
                close = getattr(responses, "aclose", None)
                if close is not None:
                    await close()
            call.finish()
        except BaseException as error:  # noqa: BLE001  # see _answer
            self._failed(call, error)
        self._done(call)

    async def _send_all(self, call: ServerCall, responses: Any) -> None:
        async for response in responses:
            data = response.SerializeToString()
            call.send(data)
            if self.added(len(data)):
                await self.turn()

    def _failed(self, call: ServerCall, error: BaseException) -> None:
        if call.open:
            call.fail(status_of(error, call.route.method.full_name))
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._done(call)
            raise error

    def _done(self, call: ServerCall) -> None:
        """The call has been answered: write that, and see whether it was the last."""
        running: Running | None = call.handle
        if running is not None and running.bucket is not None:
            self.deadlines.discard(call, running.bucket)
            running.bucket = None
        open_calls = self.calls.open
        if self.calls.out:
            self.flush_soon(alone=not open_calls)
        if self.calls.draining and not open_calls:
            self.close()

    # Ends that are not the handler's.

    def _cancel(self, call: ServerCall) -> None:
        running: Running | None = call.handle
        if running is not None and running.task is not None:
            running.task.cancel()

    def _end(self, call: ServerCall, error: StatusError) -> None:
        call.fail(error)
        self._cancel(call)
        if self.calls.draining and not self.calls.open:
            self.close()

    def _expire(self, call: Any) -> None:
        call.handle.bucket = None
        self._end(call, StatusError(Code.DEADLINE_EXCEEDED, DEADLINE_MESSAGE))

    def _give_up(self, call: Any) -> None:
        self.calls.give_up(call)
        self._cancel(call)

    def _wants_reading(self) -> bool:
        # A peer that does not take its answers gets to send no more questions.
        return self._writable and not self.calls.overfull

    def pause_writing(self) -> None:
        super().pause_writing()
        self.balance_reading()

    def _ended(self, error: Exception | None) -> None:
        del error
        for call in list(self.calls.open.values()):
            self.calls.end(call)
            self._cancel(call)
        self._on_lost(self)

    # Shutdown.

    def drain(self) -> None:
        """Take no new calls; end the connection when the open ones have been answered."""
        self.calls.draining = True
        if not self.calls.open:
            self.close()

    def abandon(self) -> None:
        """Answer UNAVAILABLE to what is still open, cancel its handlers, and end the connection."""
        for call in list(self.calls.open.values()):
            self._end(call, StatusError(Code.UNAVAILABLE, "the server is shutting down"))
        self.close()
