"""One connection as a server sees it: frames in, calls and answers out. Pure: no sockets, no clock.

`receive` takes frames and gives events for the shell to act on: a call has STARTED (run its handler), a stream has more to
read (READABLE), a call was ENDED by us (cancel its handler). The shell answers through `ServerCall`; the frames to write
collect in `out`, in order. What every frame may do to a call is here and nowhere else.

Rules that Go's clients force on us (reference numbers are PROTOCOL sections of the docs, "What other implementations do"):
* A stream ends with a Data frame REMOTE_CLOSED|NO_DATA. An OK Response in its place gives Go clients one message too many.
* Data for a stream that has ended is dropped without a word. Each answer would fill a queue of one in Go clients up to
  1.2.8 that nobody reads any more, and block their connection for good.
* A response above the limit fails its own call. (Go's server drops the connection.)
"""

from __future__ import annotations

import enum
from typing import Any

from google.protobuf.message import DecodeError, Message

from ttrpc.codes import Code
from ttrpc.envelope import response_head
from ttrpc.errors import StatusError
from ttrpc.frames import (
    DATA,
    END_OF_STREAM,
    MESSAGE_BYTES_MAX,
    NO_DATA,
    OVERSIZED,
    REMOTE_CLOSED,
    REQUEST,
    RESPONSE,
    Bytes,
    Frame,
    pack_header,
)
from ttrpc.inbox import Inbox, InboxLimits
from ttrpc.metadata import Metadata
from ttrpc.method import Route, Routes, Shape
from ttrpc.status import DEADLINE_MESSAGE, encode_error, oversized
from ttrpc.wire.ttrpc_pb2 import Request

CALLS_MAX = 1024
"""Calls at a time on one connection, if the server names no other number."""


class Event(enum.Enum):
    STARTED = "started"
    READABLE = "readable"
    ENDED = "ended"


class ServerCall:
    """One call. Every answer after its end is ignored: the handler of an ended call may still be finishing."""

    __slots__ = ("_calls", "envelope", "handle", "inbox", "open", "request", "route", "stream_id")

    def __init__(self, calls: ServerCalls, stream_id: int, route: Route, envelope: Request) -> None:
        self._calls = calls
        self.stream_id = stream_id
        self.route = route
        self.envelope = envelope
        self.open = True
        self.request: Message | None = None
        """The message of a call whose client sends one."""
        self.inbox: Inbox | None = None
        """The messages of a call whose client streams."""
        self.handle: Any = None
        """The shell's own."""

    @property
    def metadata(self) -> Metadata:
        return Metadata.received(self.envelope.metadata)

    @property
    def timeout_s(self) -> float | None:
        nanoseconds = self.envelope.timeout_nano
        return nanoseconds / 1e9 if nanoseconds else None

    def respond(self, payload: bytes) -> None:
        """End a call that has one response. Above the limit it ends with RESOURCE_EXHAUSTED."""
        if not self.open:
            return
        calls = self._calls
        head = response_head(len(payload))
        length = len(head) + len(payload)
        if length > calls.message_bytes_max:
            self.fail(oversized(length, calls.message_bytes_max))
            return
        calls.end(self)
        calls.out.append(pack_header(length, self.stream_id, RESPONSE, 0) + head)
        calls.out.append(payload)

    def send(self, message: bytes) -> None:
        """One message of a stream.

        Raises:
            StatusError: RESOURCE_EXHAUSTED, the message is above the limit. Nothing was sent and the stream lives on.
        """
        if not self.open:
            return
        calls = self._calls
        length = len(message)
        if length > calls.message_bytes_max:
            raise oversized(length, calls.message_bytes_max)
        calls.out.append(pack_header(length, self.stream_id, DATA, 0))
        calls.out.append(message)

    def finish(self) -> None:
        """End a stream well."""
        if self.open:
            self._calls.end(self)
            self._calls.out.append(pack_header(0, self.stream_id, DATA, END_OF_STREAM))

    def fail(self, error: StatusError) -> None:
        """End a call of any shape with an error."""
        if self.open:
            self._calls.end(self)
            self._calls.answer_error(self.stream_id, error)


class ServerCalls:
    """The calls of one connection."""

    def __init__(
        self,
        routes: Routes,
        *,
        calls_max: int = CALLS_MAX,
        inbox_limits: InboxLimits | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> None:
        self._routes = routes
        self._calls_max = calls_max
        self._inbox_limits = inbox_limits or InboxLimits()
        self.message_bytes_max = message_bytes_max
        self.out: list[bytes] = []
        """What is to be written, in order; the shell empties it."""
        self.open: dict[int, ServerCall] = {}
        self.last_stream_id = 0
        self.draining = False
        """New calls are answered UNAVAILABLE."""
        self.overfull: set[ServerCall] = set()
        """Calls whose inbox is above its limits: the shell stops reading, and calls `give_up` when patience ends."""

    def receive(self, frames: list[Frame]) -> list[tuple[Event, ServerCall]]:
        """Take frames as they came; what the shell has to do about them, in order.

        Kinds that a client does not send, and kinds that do not exist yet, are ignored.
        """
        events: list[tuple[Event, ServerCall]] = []
        for stream_id, kind, flags, data in frames:
            if kind == REQUEST:
                try:
                    events.append((Event.STARTED, self._begin(stream_id, flags, data)))
                except StatusError as error:
                    self.answer_error(stream_id, error)
            elif kind == DATA:
                self._data(stream_id, flags, data, events)
            elif kind == REQUEST | OVERSIZED or kind == DATA | OVERSIZED:
                self._oversized(stream_id, kind, int.from_bytes(data), events)
        return events

    def _begin(self, stream_id: int, flags: int, data: Bytes) -> ServerCall:
        """The call that a Request opens.

        Raises:
            StatusError: what to answer instead.
        """
        self._take_id(stream_id)
        if self.draining:
            raise StatusError(Code.UNAVAILABLE, "the server is shutting down")
        if len(self.open) >= self._calls_max:
            raise StatusError(
                Code.RESOURCE_EXHAUSTED,
                f"{self._calls_max} calls are in flight on this connection: no more at a time",
            )
        try:
            envelope = Request.FromString(data)  # type: ignore[arg-type]  # takes any buffer
        except DecodeError as error:
            raise StatusError(Code.INVALID_ARGUMENT, f"unmarshal request error: {error}") from error
        route = self._routes.find(envelope.service, envelope.method, flags)
        if envelope.timeout_nano < 0:
            raise StatusError(Code.DEADLINE_EXCEEDED, DEADLINE_MESSAGE)
        call = ServerCall(self, stream_id, route, envelope)
        method = route.method
        payload = envelope.payload
        if method.shape is Shape.UNARY or method.shape is Shape.SERVER_STREAM:
            call.request = decode_payload(method.decode_request, payload)
        else:
            call.inbox = Inbox(self._inbox_limits)
            if payload:
                call.inbox.put(payload)
            call.inbox.ended = bool(flags & REMOTE_CLOSED)
        self.open[stream_id] = call
        return call

    def _take_id(self, stream_id: int) -> None:
        if not stream_id & 1:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")
        if stream_id <= self.last_stream_id:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")
        self.last_stream_id = stream_id

    def _data(self, stream_id: int, flags: int, data: Bytes, events: list[tuple[Event, ServerCall]]) -> None:
        call = self.open.get(stream_id)
        if call is None:
            self._answer_unopened(stream_id)
            return
        inbox = call.inbox
        if inbox is None:
            # The client has said everything in its Request. Go's server dies of this frame; we do without it.
            return
        if inbox.ended:
            self._end_by_us(
                call, StatusError(Code.INVALID_ARGUMENT, "data after the end of the stream"), events
            )
            return
        if (data or not flags & NO_DATA) and inbox.put(data):
            self.overfull.add(call)
        if flags & REMOTE_CLOSED:
            inbox.ended = True
        events.append((Event.READABLE, call))

    def _oversized(
        self, stream_id: int, kind: int, length: int, events: list[tuple[Event, ServerCall]]
    ) -> None:
        error = oversized(length, self.message_bytes_max)
        if kind & ~OVERSIZED == REQUEST:
            try:
                self._take_id(stream_id)
            except StatusError as refused:
                error = refused
            self.answer_error(stream_id, error)
        elif (call := self.open.get(stream_id)) is None:
            self._answer_unopened(stream_id)
        elif call.inbox is not None:
            self._end_by_us(call, error, events)

    def _answer_unopened(self, stream_id: int) -> None:
        if not stream_id & 1:
            self.answer_error(
                stream_id,
                StatusError(Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams"),
            )
        elif stream_id > self.last_stream_id:
            self.answer_error(stream_id, StatusError(Code.INVALID_ARGUMENT, "StreamID is no longer active"))

    def _end_by_us(
        self, call: ServerCall, error: StatusError, events: list[tuple[Event, ServerCall]]
    ) -> None:
        call.fail(error)
        events.append((Event.ENDED, call))

    def relieve(self, call: ServerCall) -> None:
        """After taking from an inbox that was overfull: reading may go on once `overfull` is empty."""
        if call.inbox is None or not call.inbox.overfull:
            self.overfull.discard(call)

    def give_up(self, call: ServerCall) -> None:
        """Patience with the reader of this call has ended; the shell cancels its handler."""
        call.fail(StatusError(Code.RESOURCE_EXHAUSTED, "the handler does not read what the client sends"))

    def end(self, call: ServerCall) -> None:
        """Forget a call that has been answered, or whose connection went."""
        call.open = False
        self.open.pop(call.stream_id, None)
        if call.inbox is not None:
            call.inbox.clear()
            call.inbox.ended = True
            self.overfull.discard(call)

    def answer_error(self, stream_id: int, error: StatusError) -> None:
        data = encode_error(error, self.message_bytes_max)
        self.out.append(pack_header(len(data), stream_id, RESPONSE, 0) + data)


def decode_payload(decode: Any, payload: Bytes) -> Message:
    """A message from its bytes.

    Raises:
        StatusError: INTERNAL, as Go's server answers it.
    """
    try:
        message: Message = decode(payload)
    except DecodeError as error:
        raise StatusError(Code.INTERNAL, f"ttrpc: error unmarshalling payload: {error}") from error
    return message
